"""Check one cell: planned probes of the law, a random search, what follows a load; then what is known to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from harness.checks.cell import Cell
from harness.checks.describe import failed, passed
from harness.checks.family import LAW_FAMILIES, family_names, follow
from harness.checks.known import KnownFailure
from harness.checks.plan import Plan, examples_for, planned, smoke_example
from harness.checks.search import Search, observe, search, shrink
from harness.checks.symptoms import Symptoms, unloaded
from harness.checks.trial import run_trial
from harness.example import Example
from harness.law.diagnosis import Diagnosis, diagnose, law_record
from harness.law.probe import Probe
from harness.verdict.verdict import LawRecord, Verdict

_KNOWN_EXAMPLES = 40


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
    result.add(*observe(cell, plan.pins.example(cell) if plan.pins else smoke_example(cell, cell.targets)))
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
        _add_what_follows(cell, [pinned.dtype], pinned, result)
        return
    strategy, smoke = examples_for(cell, plan).filter(allowed), smoke_example(cell, plan.layers_in(cell))
    result.join(search(cell, strategy, max_examples=plan.examples_in(cell), base_seed=plan.seed))
    for code, finding in result.findings.items() if plan.shrink else ():
        if not _expected(code, general):
            result.findings[code] = shrink(cell, strategy, finding, base_seed=plan.seed, allowed=allowed)
    _add_what_follows(cell, [d for d in plan.dtypes if allowed(replace(smoke, dtype=d))], smoke, result)


def _add_what_follows(cell: Cell, dtypes: Sequence[str], example: Example, result: Search) -> None:
    for finding in follow(cell, run_trial(cell, example), tuple(dtypes)):
        result.findings.setdefault(finding.code, finding)


def _verdicts(cell: Cell, result: Search, diagnosis: Diagnosis) -> Iterator[Verdict]:
    """Turn what was found into verdicts; a law that explains a fault speaks for every symptom of it."""
    smoke = [f for f in result.findings.values() if f.family == "smoke"]
    reported: set[str] = set()
    symptoms = Symptoms(result, diagnosis)
    faults = [f for f in result.findings.values() if not symptoms.include(f.code)]
    for finding in faults or result.findings.values():  # whatever is folded, a fault that was seen is reported
        code, family = finding.code, finding.family
        if code == "LH209":
            code, family = diagnosis.code or code, diagnosis.family
        reported.add(family)
        yield failed(cell, finding, diagnosis, code=code, family=family, examples=result.examples)
    for family in family_names():
        if family in reported or (smoke and result.examples == 1):
            continue
        yield passed(cell, family, result.examples, diagnosis if family in LAW_FAMILIES else None)


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

    limited = replace(cell, seconds=known.seconds)
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
