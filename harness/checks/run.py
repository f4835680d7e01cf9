"""Check whole loaders: every declared cell in its own child process, verdicts streamed as they come.

A cell is checked by planned probes of the law, a random search and what follows a load; then what is known to fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from harness.checks.apart import SILENCE, budget, served
from harness.checks.cell import Cell, cells_of
from harness.checks.describe import NamedFinding, passed, through_codes
from harness.checks.family import LAW_FAMILIES, family_names, follow
from harness.checks.known import KNOWN_EXAMPLES, KnownFailure, applies, covers, no_longer_silent, tried_alone, unmatched
from harness.checks.outputs import NOT_SEEN, SEEN
from harness.checks.plan import Plan, examples_for, planned, smoke_example
from harness.checks.search import Search, observe, search, shrink
from harness.checks.trial import run_trial
from harness.example import Example
from harness.isolation.jobs import Channel, JobEnd, run_jobs
from harness.isolation.limits import Limits
from harness.isolation.subject import Timed
from harness.law.diagnosis import Diagnosis, diagnose, law_record
from harness.law.probe import Probe, probe_from
from harness.loaders.benches import Which
from harness.loaders.registry import resolve
from harness.verdict.codes import CODES
from harness.verdict.verdict import LawRecord, Verdict

__all__ = ["Limits", "Measured", "check_cell", "check_cells", "check_loader", "died"]

_TELL_SECONDS = 0.25
_NOT_LOADED = ("LH101", "LH102")
_DIRECTIONS = frozenset({"LH104", "LH301", "LH302", "LH303", "LH304", "LH306"})
_RESIDUAL = (
    "LH301",
    "LH304",
    "LH306",
    "LH501",
)  # four names of an unexplained change, which one fault may show in turn


@dataclass(frozen=True)
class Measured:
    """What a cell measured on the way to its verdicts: every probe, and the law that explains them if one does.

    `labels` counts the examples by what they are.
    """

    law: LawRecord | None
    probes: tuple[Probe, ...]
    labels: Mapping[str, int] = field(default_factory=dict)


def check_cells(
    cells: Sequence[Cell],
    plan: Plan,
    limits: Limits = Limits(),
    *,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    on_examples: Callable[[Cell, int, float], None] = lambda cell, number, seconds: None,
    on_measured: Callable[[Cell, Measured], None] = lambda cell, measured: None,
) -> list[Verdict]:
    """Check `cells`, at most `limits.workers` at a time; a cell whose process died has one errored verdict more.

    `on_examples` hears, a few times a second, how many examples a cell tried since, and how many seconds those took.

    Raises:
        UserError: the pinned example names a module that a bench does not have.
    """
    for cell in cells:
        _ = plan.pins and plan.pins.example(cell)  # a bad pin is bad usage, not a loader that raises
    verdicts: list[Verdict] = []

    def take(verdict: Verdict) -> None:
        verdicts.append(verdict)
        on_verdict(verdict)

    def on_event(index: int, event: dict[str, Any]) -> None:
        if "verdict" in event:
            take(Verdict.model_validate_json(event["verdict"]))
        elif "probes" in event:
            on_measured(cells[index], _measured_from(event))
        elif "examples" in event:
            on_examples(cells[index], event["examples"], event["seconds"])
        else:
            on_cell(cells[index])

    jobs = [_job(cell, plan, limits) for cell in cells]
    longest = max((budget(cell, limits) for cell in cells), default=None)
    ends = run_jobs(jobs, workers=limits.workers, silence=SILENCE, budget=longest, on_event=on_event)
    for cell, end in zip(cells, ends, strict=True):
        if end.status != "done":
            take(died(cell, end))
    for known in unmatched(plan.known, cells) if plan.pins is None else ():
        take(_stale(known))
    return verdicts


def check_loader(
    load: Callable[..., object] | str,
    *,
    formats: Iterable[str] | None = None,
    benches: Iterable[Which] | None = None,
    variants: Iterable[str] | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    known_failures: Sequence[KnownFailure] = (),
    limits: Limits = Limits(),
) -> list[Verdict]:
    """Check a loader, given as a function or by the string that names it, and return all verdicts.

    `benches` are names, or functions under `@bench`.
    `max_examples` (default: 200, of a `cmd:` loader 10) are drawn per format, bench and variant, reproducibly from
    `seed`.

    Raises:
        LoaderSpecError: `load` names no loader.
        UserError: an unknown format, bench or variant.
    """
    cells, skipped = cells_of(resolve(load), formats, benches, variants)
    plan = Plan(max_examples=max_examples, seed=seed, known=tuple(known_failures))
    return skipped + check_cells(cells, plan, limits)


def _job(cell: Cell, plan: Plan, limits: Limits) -> Callable[[Channel], None]:
    def job(channel: Channel) -> None:
        with served(cell, channel, limits) as own:
            own = _telling(own, channel)
            for verdict in check_cell(own, plan, lambda measured: channel.send(_as_event(measured))):
                channel.send({"verdict": verdict.model_dump_json()})
        channel.send({"done": True})

    return job


def _telling(cell: Cell, channel: Channel) -> Cell:
    """Return the cell, which tells how many examples it has tried."""
    return cell if cell.asked is None else replace(cell, asked=Timed(cell.asked, _Told(channel)))


@dataclass
class _Told:
    """Examples that were tried and not told of yet, and their seconds; the first is told at once."""

    channel: Channel
    number: int = 0
    seconds: float = 0.0
    at: float = 0.0

    def __call__(self, seconds: float) -> None:
        self.number, self.seconds, now = self.number + 1, self.seconds + seconds, time.monotonic()
        if now - self.at > _TELL_SECONDS:
            self.channel.send({"examples": self.number, "seconds": self.seconds})
            self.number, self.seconds, self.at = 0, 0.0, now


def _as_event(measured: Measured) -> dict[str, Any]:
    law = measured.law.model_dump() if measured.law else None
    return {"law": law, "probes": [asdict(probe) for probe in measured.probes], "labels": dict(measured.labels)}


def _measured_from(event: dict[str, Any]) -> Measured:
    law = LawRecord.model_validate(event["law"]) if event["law"] else None
    return Measured(law, tuple(map(probe_from, event["probes"])), event["labels"])


def died(cell: Cell, end: JobEnd) -> Verdict:
    """Return the verdict of a cell whose process ended in another way than by finishing."""
    rows = [("loader", cell.subject.title), ("file", cell.place)]
    rows += [("printed", line) for line in end.output_tail.strip().splitlines()[-3:]]
    rows += [("reproduce", end.last_label)] if end.last_label else []
    fields = {"code": "LH901", "rows": tuple(rows), "reproduce": end.last_label, "seconds": end.seconds}
    return cell.verdict("smoke", "errored", title=f"loader raised: {end.what}", **fields)


def _stale(known: KnownFailure) -> Verdict:
    title = f"known failure {known.id} matches no cell of {known.loader}: remove or correct its line"
    return Verdict(loader=known.loader, check="known_failures", outcome="errored", code=known.code, title=title)


def check_cell(
    cell: Cell, plan: Plan, on_measured: Callable[[Measured], object] = lambda measured: None
) -> Iterator[Verdict]:
    """Yield one verdict per family that holds, and one per distinct fault where it does not."""
    known = tuple(k for k in plan.known if applies(k, cell))
    general = tuple(k for k in known if k.trait is None)
    result = Search()
    result.add(*observe(cell, plan.pins.example(cell) if plan.pins else smoke_example(cell, cell.targets)))
    if result.findings.keys().isdisjoint(("LH901", "LH902", "LH903")):
        _measure(cell, plan, known, result)
    diagnosis = diagnose(result.probes, unloaded=unloaded(result.probes))
    law = law_record(diagnosis.law) if diagnosis.law else None
    on_measured(Measured(law, tuple(result.probes), dict(result.labels)))
    verdicts = list(_verdicts(cell, result, diagnosis))
    short = not plan.whole(cell) or plan.examples_in(cell) < KNOWN_EXAMPLES
    yield from (_excused(verdict, general, short=short) for verdict in verdicts)
    shown = {k for k in general for verdict in verdicts if k.names(verdict, short=short)}
    if plan.pins is None:
        yield from (tried_alone(cell, plan, k) for k in known if k not in shown and not k.kinds)
        yield from (no_longer_silent(cell, k, result.examples) for k in known if k.spoken(cell.heard))


def _measure(cell: Cell, plan: Plan, known: Sequence[KnownFailure], result: Search) -> None:
    """Collect probes and findings: the planned examples first, then the pinned one or the random search."""
    avoided, general = [k for k in known if k.trait], [k for k in known if k.trait is None]

    def allowed(example: Example) -> bool:
        return not any(covers(k, cell, example) for k in avoided)

    for example in filter(allowed, planned(cell, plan.layers_in(cell))):
        observation, probes, findings = observe(cell, example)
        result.add(observation, probes, [] if plan.pins else findings)
    if plan.pins:  # the planned examples only help to name the law of the pinned one
        pinned = plan.pins.example(cell)
        if cell.subject.outputs:
            return
        _add_what_follows(cell, [pinned.dtype], pinned, result)
        return
    strategy, smoke = examples_for(cell, plan).filter(allowed), smoke_example(cell, plan.layers_in(cell))
    result.join(search(cell, strategy, max_examples=plan.examples_in(cell), base_seed=plan.seed))
    for code, finding in result.findings.items() if plan.shrink else ():
        if not finding.check and not _expected(code, general):
            result.findings[code] = shrink(cell, strategy, finding, base_seed=plan.seed, allowed=allowed)
    if cell.subject.outputs:
        return
    dtypes = [d for d in plan.dtypes if d in cell.dtypes and allowed(replace(smoke, dtype=d))]
    _add_what_follows(cell, dtypes, smoke, result)


def _add_what_follows(cell: Cell, dtypes: Sequence[str], example: Example, result: Search) -> None:
    for finding in follow(cell, run_trial(cell, example), tuple(dtypes)):
        key = f"{finding.check}:{finding.code}" if finding.check else finding.code  # beside one of the same code
        result.findings.setdefault(key, finding)


def _verdicts(cell: Cell, result: Search, diagnosis: Diagnosis) -> Iterator[Verdict]:
    """Turn what was found into verdicts; a law that explains a fault speaks for every symptom of it."""
    smoke = [f for f in result.findings.values() if f.family == "smoke"]
    reported: set[str] = set()
    symptoms = Symptoms(result, diagnosis)
    faults = [f for f in result.findings.values() if f.check or not symptoms.include(f.code)]
    for finding in faults or result.findings.values():  # whatever is folded, a fault that was seen is reported
        where = "" if finding.check or finding.code not in result.counts else result.only_where(finding.code)
        fault = NamedFinding(cell, finding, diagnosis, where)
        reported.add(fault.family)
        yield fault.verdict(result.examples)
    for family in family_names():
        if family in reported or (smoke and result.examples == 1) or (family == "silence" and not cell.heard):
            continue
        if cell.subject.outputs and family not in SEEN:
            yield cell.verdict(family, "skipped", title="not judged", reason=NOT_SEEN)
            continue
        right = passed(cell, family, result.examples, diagnosis if family in LAW_FAMILIES else None)
        yield through_codes(cell, _with_seen(right, result), result.probes)


def _with_seen(verdict: Verdict, result: Search) -> Verdict:
    """Return the verdict on the scale with what was seen, and how alpha = 0 was read; others as they are."""
    if verdict.check != "scale":
        return verdict
    seen = {
        f"{of}_dtypes": [word for kind, word in map(_words, result.labels) if kind == of] for of in ("model", "file")
    }
    how = " and ".join(sorted(result.zero_alpha))
    title = f"{verdict.title}; alpha = 0 is read {how}" if how else verdict.title
    return verdict.model_copy(update={"title": title, "data": seen | ({"zero_alpha": how} if how else {})})


def _words(label: str) -> tuple[str, str]:
    kind, _, word = label.partition(" ")
    return kind, word


def _expected(code: str, known: Sequence[KnownFailure]) -> bool:
    """Whether a finding will be excused: its counterexample is on record, so none has to be made."""
    return any(code == k.code or (code == "LH209" and k.of_scale) for k in known if not k.kinds)


def _excused(verdict: Verdict, known: Sequence[KnownFailure], *, short: bool) -> Verdict:
    return next((k.excuse(verdict) for k in known if k.names(verdict, short=short)), verdict)


@dataclass(frozen=True)
class Symptoms:
    """What else was found beside a finding, and the law behind the scales."""

    result: Search
    diagnosis: Diagnosis

    def include(self, code: str) -> bool:
        """Tell whether findings of `code` only follow from what another finding says."""
        if any(code in CODES[other].explains for other in self.result.findings if other in CODES):
            return True
        if code == "LH209" and self._by_chance:
            return True
        if code in _RESIDUAL:
            return self._rarer(code, 3)
        if code in _NOT_LOADED:
            return self._of_coverage(code)
        return code == "LH209" and self._of_scale()

    def _of_coverage(self, code: str) -> bool:
        if self._by_law or ("LH209" in self.result.findings and not self._unloaded and not self._silent):
            return True  # the scale is wrong, and sometimes so small that nothing seems to be loaded
        if self._chance(code):
            return True
        modules = {p.module for p in self.result.probes}
        return code == "LH101" and "LH102" in self.result.findings and len(self._unloaded) < len(modules)

    def _of_scale(self) -> bool:
        found = self.result.findings
        if found["LH209"].faint and not _DIRECTIONS.isdisjoint(found):
            return True  # where the change is large enough to tell, its direction is wrong
        if self._lost_digits or (self.diagnosis.code is None and "LH501" in found):
            return True
        named = self.diagnosis.law or self.diagnosis.trait
        if not named and self._chance("LH209"):
            return True
        return self._silent and not self._by_law and any(code in found for code in _NOT_LOADED)

    def _chance(self, code: str) -> bool:
        """Whether a change that is wrong throughout has, now and then, some scale or none."""
        return not self._unloaded and self._rarer(code, 10)

    def _rarer(self, code: str, times: int) -> bool:
        """Whether an unexplained change of some size is seen at least `times` as often as `code`."""
        counts = self.result.counts
        most = max(counts.get(other, 0) for other in _RESIDUAL)
        return most > 0 and times * counts.get(code, 0) <= most

    @cached_property
    def _wrong(self) -> list[Probe]:
        return [p for p in self.result.probes if not p.right]

    @cached_property
    def _unloaded(self) -> set[str]:
        return unloaded(self.result.probes)

    @property
    def _silent(self) -> bool:
        return all(abs(p.measured) <= 4 * p.tolerance for p in self._wrong)

    @property
    def _by_law(self) -> bool:
        law = self.diagnosis.law
        return bool(law and not law.is_trained and not self._unloaded)

    @property
    def _by_chance(self) -> bool:
        """Whether what was measured is another in every call, as dropout makes it."""
        left_on = self.result.findings.get("LH406")
        seen = left_on.observation if left_on else None
        return seen is not None and (bool(seen.unsteady) or any(n.endswith(" (dropout)") for n in seen.training))

    @property
    def _lost_digits(self) -> bool:
        """Whether every scale that is off is off by less than the digits that LH501 saw lost."""
        if "LH501" not in self.result.findings:
            return False
        lost = self.result.findings["LH501"]
        share = max((lost.observation.fits[name][0].relative_residual for name in lost.modules), default=0.0)
        wrong = self._wrong
        return bool(wrong) and all(abs(p.measured - p.expected) <= share * abs(p.expected) for p in wrong)


def unloaded(probes: Sequence[Probe]) -> set[str]:
    """Return the modules that never changed although their scale should have been visible."""
    visible = [p for p in probes if abs(p.expected) > 4 * p.tolerance]
    changed = {p.module for p in visible if abs(p.measured) > 4 * p.tolerance}
    return {p.module for p in visible} - changed
