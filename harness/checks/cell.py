"""Check one cell of the matrix: smoke, planned probes of the law, random search, loading twice, unloading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from hypothesis.strategies import SearchStrategy, sampled_from

from harness.checks.describe import failed, passed
from harness.checks.design import has_alpha, planned
from harness.checks.known import KnownFailure
from harness.checks.search import Search, observe, search
from harness.checks.shrink import shrink
from harness.checks.state import check_state
from harness.checks.symptoms import Symptoms, unloaded
from harness.checks.trial import Cell
from harness.errors import UserError
from harness.example import Example, Target
from harness.files import FORMATS
from harness.law.diagnosis import Diagnosis, diagnose, law_record
from harness.law.probe import Probe
from harness.loaders.protocol import CORE_BENCHES, CORE_VARIANTS
from harness.strategies import examples as lora_examples
from harness.verdict.verdict import LawRecord, Verdict

FAMILIES = ("smoke", "coverage", "scale", "strength", "direction", "side_effects", "numerics")
_LAW_FAMILIES = ("scale", "strength")
_KNOWN_EXAMPLES = 40


@dataclass(frozen=True)
class Pins:
    """One example fixed from outside: `modules` by name, or `rank` and `alpha` for every target of a cell."""

    modules: tuple[Target, ...] = ()
    rank: int = 4
    alpha: float | None = 8.0
    strength: float = 1.0
    dtype: str = "float32"
    file_dtype: str | None = None
    key_seed: int = 0
    value_seed: int = 0

    def example(self, cell: Cell) -> Example:
        """Return the example in `cell`.

        Raises:
            UserError: a module the cell's bench does not have.
        """
        for target in self.modules:
            if target.name not in cell.view.layers:
                near = ", ".join(cell.targets[:3])
                raise UserError(
                    f"module={target.name!r}: bench {cell.bench_name} has no such layer (it has {near}, ...)"
                )
        targets = self.modules or tuple(Target(name, self.rank, self.alpha) for name in cell.targets)
        file_dtype = self.file_dtype or self.dtype
        return Example(targets, self.strength, self.dtype, file_dtype, self.key_seed, self.value_seed)


@dataclass(frozen=True)
class Plan:
    """How hard to look: examples per cell, the seed, one pinned example instead of a search, what is known to fail.

    `max_examples=None` stands for what the subject has by default, less of it when `quick`.
    `share` is the part of the examples that a cell gets which is not plain LoRA on one of the core benches; below 1 its
    planned files have at most `max_layers` modules too.
    """

    max_examples: int | None = None
    seed: int = 0
    pins: Pins | None = None
    known: tuple[KnownFailure, ...] = ()
    max_layers: int = 8
    dtypes: tuple[str, ...] = field(default=("float32", "bfloat16"))
    shrink: bool = True
    share: float = 1.0
    quick: bool = False

    def whole(self, cell: Cell) -> bool:
        """Whether `cell` is checked at full length."""
        return self.share == 1 or (cell.variant_name in CORE_VARIANTS and cell.bench_name in CORE_BENCHES)

    def examples_in(self, cell: Cell) -> int:
        """Return how many random examples `cell` gets."""
        most = self.max_examples or cell.subject.defaults.examples_in(quick=self.quick)
        return most if self.whole(cell) else max(1, round(self.share * most))

    def layers_in(self, cell: Cell) -> tuple[str, ...]:
        """Return the layers that planned files cover: all, or an even choice of `max_layers` of them."""
        if self.whole(cell) or len(cell.targets) <= self.max_layers:
            return cell.targets
        step = (len(cell.targets) - 1) / (self.max_layers - 1)
        return tuple(cell.targets[round(step * i)] for i in range(self.max_layers))


@dataclass(frozen=True)
class Measured:
    """What a cell measured on the way to its verdicts: every probe, and the law that explains them if one does."""

    law: LawRecord | None
    probes: tuple[Probe, ...]


def check_cell(
    cell: Cell, plan: Plan, on_measured: Callable[[Measured], object] = lambda measured: None
) -> Iterator[Verdict]:
    """Yield one verdict per family that holds, and one per distinct fault where it does not."""
    known = tuple(k for k in plan.known if k.applies(cell))
    general = tuple(k for k in known if k.trait is None)
    result = Search()
    result.add(*observe(cell, plan.pins.example(cell) if plan.pins else _smoke_example(cell, cell.targets)))
    if "LH901" not in result.counts and "LH902" not in result.counts:
        _measure(cell, plan, known, result)
    diagnosis = diagnose(result.probes, unloaded=unloaded(result.probes))
    on_measured(Measured(law_record(diagnosis.law) if diagnosis.law else None, tuple(result.probes)))
    verdicts = list(_verdicts(cell, result, diagnosis))
    short = not plan.whole(cell)
    yield from (_excused(verdict, general, short=short) for verdict in verdicts)
    shown = {k for k in general for verdict in verdicts if k.names(verdict.code, short=short)}
    if plan.pins is None:
        yield from (_known_verdict(cell, plan, k) for k in known if k not in shown)


def _measure(cell: Cell, plan: Plan, known: Sequence[KnownFailure], result: Search) -> None:
    """Collect probes and findings: the planned examples first, then the pinned one or the random search."""
    avoided, general = [k for k in known if k.trait], [k for k in known if k.trait is None]

    def allowed(example: Example) -> bool:
        return not any(k.covers(cell, example) for k in avoided)

    for example in filter(allowed, planned(cell, plan.layers_in(cell))):
        observation, probes, findings = observe(cell, example)
        result.add(observation, probes, [] if plan.pins else findings)
    if plan.pins:  # the planned examples only help to name the law of the pinned one
        pinned = plan.pins.example(cell)
        _add_state_findings(cell, [pinned.dtype], pinned, result)
        return
    strategy, smoke = examples_for(cell, plan).filter(allowed), _smoke_example(cell, plan.layers_in(cell))
    result.join(search(cell, strategy, max_examples=plan.examples_in(cell), base_seed=plan.seed))
    for code, finding in result.findings.items() if plan.shrink else ():
        if not _expected(code, general):
            result.findings[code] = shrink(cell, strategy, finding, base_seed=plan.seed, allowed=allowed)
    _add_state_findings(cell, [d for d in plan.dtypes if allowed(replace(smoke, dtype=d))], smoke, result)


def examples_for(cell: Cell, plan: Plan) -> SearchStrategy[Example]:
    """Return the random examples of the cell."""
    variant = cell.variant
    return lora_examples(
        cell.targets,
        missing_alpha=FORMATS[cell.format].alpha[0] in ("tensor", "header"),
        alpha=has_alpha(cell),
        max_layers=plan.max_layers,
        dtypes=plan.dtypes,
        max_rank=variant.rank_limit(cell.view),
        strength=sampled_from(variant.strengths) if variant.strengths else None,
    )


def _smoke_example(cell: Cell, layers: Sequence[str]) -> Example:
    rank = min(4, cell.variant.rank_limit(cell.view))
    return Example(tuple(Target(name, rank, 8.0 if has_alpha(cell) else None) for name in layers))


def _add_state_findings(cell: Cell, dtypes: Sequence[str], example: Example, result: Search) -> None:
    for finding in check_state(cell, example, dtypes=dtypes):
        result.findings.setdefault(finding.code, finding)


def _verdicts(cell: Cell, result: Search, diagnosis: Diagnosis) -> Iterator[Verdict]:
    """Turn what was found into verdicts; a law that explains a fault speaks for every symptom of it."""
    smoke = [f for f in result.findings.values() if f.family == "smoke"]
    reported: set[str] = set()
    symptoms = Symptoms(result, diagnosis)
    speaking = [f for f in result.findings.values() if not symptoms.include(f.code)]
    for finding in speaking or result.findings.values():  # whatever is folded, a fault that was seen is reported
        code, family = finding.code, finding.family
        if code == "LH209":
            code, family = diagnosis.code or code, diagnosis.family
        reported.add(family)
        yield failed(cell, finding, diagnosis, code=code, family=family, examples=result.examples)
    for family in FAMILIES:
        if family in reported or (smoke and result.examples == 1):
            continue
        yield passed(cell, family, result.examples, diagnosis if family in _LAW_FAMILIES else None)


def _expected(code: str, known: Sequence[KnownFailure]) -> bool:
    """Whether a finding will be excused: its counterexample is on record, so none has to be made."""
    return any(code == k.code or (code == "LH209" and k.of_scale) for k in known)


def _excused(verdict: Verdict, known: Sequence[KnownFailure], *, short: bool) -> Verdict:
    return next((k.excuse(verdict) for k in known if k.names(verdict.code, short=short)), verdict)


def _unexpected_pass(cell: Cell, known: KnownFailure, examples: int) -> Verdict:
    verdict = passed(cell, "known_failures", examples)
    return verdict.model_copy(
        update={"outcome": "xpassed", "code": known.code, "title": known.gone(), "reason": known.reason}
    )


def _known_verdict(cell: Cell, plan: Plan, known: KnownFailure) -> Verdict:
    """Try the inputs with a known fault on their own: they must still fail with the recorded code.

    A line without a trait speaks of all inputs; it is tried when the search, perhaps a short one, did not show it.
    """

    def tried(example: Example) -> bool:
        return known.trait is None or known.covers(cell, example)

    limited = replace(cell, seconds=known.seconds or cell.seconds)
    until = None if known.of_scale else known.code  # a law takes more than one example
    found = Search()
    for example in filter(tried, planned(cell, plan.layers_in(cell))):
        if until not in found.counts:
            found.add(*observe(limited, example))
    if (verdict := _shown(limited, known, found)) is not None:
        return verdict
    strategy = examples_for(cell, plan).filter(tried)
    found.join(search(limited, strategy, max_examples=_KNOWN_EXAMPLES, base_seed=plan.seed, until=until))
    return _shown(limited, known, found) or _unexpected_pass(limited, known, found.examples)


def _shown(cell: Cell, known: KnownFailure, found: Search) -> Verdict | None:
    """Return the excused verdict when the recorded fault is among what was found."""
    diagnosis = diagnose(found.probes)
    for finding in found.findings.values():
        code = (diagnosis.code or finding.code) if finding.code == "LH209" else finding.code
        if code == known.code:
            verdict = failed(cell, finding, diagnosis, code=code, family=finding.family, examples=found.examples)
            return known.excuse(verdict)
    return None
