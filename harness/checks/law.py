"""`measure_law`: the scaling law of one loader, from the planned probes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.checks.apart import done_apart
from harness.checks.cell import Cell
from harness.checks.plan import planned
from harness.checks.search import observe
from harness.isolation.calls import Raised
from harness.law.diagnosis import Diagnosis, diagnose
from harness.law.probe import Probe, fields_of, probe_from
from harness.loaders.benches import Which, bench_name
from harness.loaders.protocol import Subject
from harness.loaders.registry import resolve
from harness.verdict.codes import CODES


@dataclass(frozen=True)
class MeasuredLaw:
    """What the planned probes showed: the diagnosis (law, code, trait), the probes, and why some failed.

    `late`: they failed at a time limit; `killed`: by a signal from outside. Neither is the loader's answer.
    """

    diagnosis: Diagnosis
    probes: tuple[Probe, ...] = field(repr=False)
    raised: tuple[str, ...] = ()
    late: bool = False
    killed: bool = False

    @property
    def formula(self) -> str | None:
        """The law as text, or None when no law of the grammar explains the probes."""
        return self.diagnosis.law.formula if self.diagnosis.law else None

    def __str__(self) -> str:
        """Return the law in a line: `strength * alpha (LH201 alpha not divided by rank)`."""
        code, trait = self.diagnosis.code, self.diagnosis.trait
        law = self.formula or ("no law of the grammar" if self.probes else "not measured")
        where = f" where {trait}" if trait else ""
        named = f" ({code} {CODES[code].title}{where})" if code else ""
        return "; ".join([f"{law}{named}", *self.raised])


def measure_law(
    load: Callable[..., object] | str | Subject,
    *,
    format: str | None = None,
    bench: Which | None = None,
    alpha: bool = True,
    variant: str = "lora",
) -> MeasuredLaw:
    """Load about ten planned files with ranks, alphas and strengths that tell the laws apart, and name the law.

    `format` and `bench` default to the first ones the loader declares; `alpha=False` writes files without alpha. Files
    with several ranks are left out for a loader that refuses them. `variant` is what the modules of the files are. Each
    call has the subject's default time limit.

    Raises:
        LoaderSpecError: `load` names no loader.
    """
    subject = load if isinstance(load, Subject) else resolve(load)
    form, default = subject.cells[0]
    cell = Cell(subject, format or form, default if bench is None else bench_name(bench), variant)
    first = _apart(cell, alpha, uniform=False)
    return first if first.probes else _apart(cell, alpha, uniform=True)


def law_of(cell: Cell, *, alpha: bool = True) -> MeasuredLaw:
    """Return the law of a cell whose loader runs where it can do no harm: `cell.asked`."""
    first = _named(_measured(cell, alpha, uniform=False))
    return first if first.probes else _named(_measured(cell, alpha, uniform=True))


def _apart(cell: Cell, alpha: bool, *, uniform: bool) -> MeasuredLaw:
    """Have the probes made where the loader can do no harm, and name their law here."""
    seen, end = done_apart(cell, lambda own: _measured(own, alpha, uniform=uniform))
    if seen is None:
        return MeasuredLaw(diagnose(()), (), (end.what,), late=end.status == "timeout", killed=end.from_outside)
    return _named(seen)


def _named(seen: Mapping[str, Any]) -> MeasuredLaw:
    probes = [probe_from(fields) for fields in seen["probes"]]
    raised = [Raised(**each) for each in seen["raised"]]
    late, killed = any(each.timed_out for each in raised), any(each.killed for each in raised)
    return MeasuredLaw(diagnose(probes), tuple(probes), tuple(each.what for each in raised), late=late, killed=killed)


def _measured(cell: Cell, alpha: bool, *, uniform: bool) -> dict[str, Any]:
    probes: list[Probe] = []
    raised: list[dict[str, Any]] = []
    for example in planned(cell, alpha=alpha, uniform=uniform):
        if len({target.alpha is None for target in example.targets}) > 1:  # a question of its own, which some refuse
            continue
        observation, seen, _ = observe(cell, example)
        probes += seen
        if observation.raised:
            raised.append(asdict(observation.raised))
            break
    return {"probes": [fields_of(probe) for probe in probes], "raised": raised}
