"""Examine one cell: planned probes of the law, a random search, what follows a load, what is known to fail; verdicts.

A law that is sure before the search is through is told at once; the rest of the search may still find more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from harness.checks.cell import Cell
from harness.checks.describe import NamedFinding, passed, through_codes
from harness.checks.early import Early, Tell
from harness.checks.families.silence import NOT_TRIED, tries_silence
from harness.checks.family import LAW_FAMILIES, Sighting, family_names, follow
from harness.checks.known import KNOWN_EXAMPLES, KnownFailure, applies, binds, covers, no_longer_silent, tried_alone
from harness.checks.observation import probes_of
from harness.checks.outputs import NOT_SEEN, SEEN
from harness.checks.plan import Plan, examples_for, planned, smoke_example
from harness.checks.search import Search, observe, search, shrink
from harness.checks.symptoms import Symptoms, unloaded
from harness.checks.trial import run_trial
from harness.example import Example
from harness.isolation.subject import started_anew
from harness.law.diagnosis import Diagnosis, agrees, diagnose, law_record
from harness.law.probe import Probe
from harness.law.traits import Trait
from harness.verdict.verdict import LawRecord, Verdict

_SCALE = "LH209"  # some law is wrong
_OTHER_SCALES = "scales are off as well, which another fault explains: of their law nobody can say anything yet"
_ALONE = "loaded first in a fresh process this file is right: what was loaded before it decides (see LH408)"
_OVERLAPPING = "patterns overlapping"
_SEVERAL = Trait("several patterns of the configuration fit a module, of which PEFT takes the first", "file")
_TURNS = 2  # of making plain and naming the law
_STOPPED = frozenset({"LH901", "LH902", "LH903"})


@dataclass(frozen=True)
class Measured:
    """What a cell measured on the way to its verdicts: every probe, and the law that explains them if one does.

    `labels` counts the examples by what they are.
    """

    law: LawRecord | None
    probes: tuple[Probe, ...]
    labels: Mapping[str, int] = field(default_factory=dict)


def check_cell(
    cell: Cell,
    plan: Plan,
    on_measured: Callable[[Measured], object] = lambda measured: None,
    on_sure: Tell | None = None,
) -> Iterator[Verdict]:
    """Yield one verdict per family that holds, and one per distinct fault where it does not.

    `on_sure` hears the verdict on the law as soon as that is sure, which is before anything is yielded.
    """
    known = tuple(k for k in plan.known if applies(k, cell))
    general = tuple(k for k in known if k.trait is None)
    result = Search()
    result.add(*observe(cell, plan.pins.example(cell) if plan.pins else smoke_example(cell, cell.targets)))
    runs = result.findings.keys().isdisjoint(_STOPPED)
    if runs:
        _measure(cell, plan, known, result, Early(cell, plan, general, on_sure))
    labels = dict(result.labels)
    short = not plan.whole(cell) or plan.examples_in(cell) < KNOWN_EXAMPLES
    plain = _Plainer(cell, plan, known, result) if runs and plan.shrink and plan.pins is None else None

    def excused(verdict: Verdict) -> Verdict:
        return next((k.excuse(verdict) for k in general if k.names(verdict, short=short)), verdict)

    diagnosis = _diagnosis(cell, result, excused, plain)
    law = law_record(diagnosis.law) if diagnosis.law else None
    on_measured(Measured(law, tuple(result.probes), labels))
    verdicts = list(_verdicts(cell, result, diagnosis, excused, plain))
    loads = [finding for code, finding in plain.made.items() if code in result.counts] if plain else []
    yield from (_told_if_hidden(cell, plan, verdict, loads) for verdict in verdicts)
    shown = {k for k in general for verdict in verdicts if k.names(verdict, short=short)}
    if plan.pins is None:
        for line in (k for k in known if k not in shown and not k.kinds):
            yield from tried_alone(cell, plan, line)
        spoken = (k for k in known if k.spoken(cell.heard) and binds(k, cell))
        yield from (no_longer_silent(cell, k, result.examples) for k in spoken)


def _allowed(cell: Cell, known: Sequence[KnownFailure]) -> Callable[[Example], bool]:
    """Return which examples are tried: those with a known fault of their own are not."""
    avoided = [k for k in known if k.trait]
    return lambda example: not any(covers(k, cell, example) for k in avoided)


def _measure(cell: Cell, plan: Plan, known: Sequence[KnownFailure], result: Search, early: Early) -> None:
    """Collect probes and findings: the planned examples first, then the pinned one or the random search."""
    allowed = _allowed(cell, known)
    for example in filter(allowed, planned(cell, plan.layers_in(cell))):
        observation, probes, findings = observe(cell, example)
        result.add(observation, probes, [] if plan.pins else findings)
    if plan.pins:  # the planned examples only help to name the law of the pinned one
        if not cell.subject.outputs:
            pinned = plan.pins.example(cell)
            _add_what_follows(cell, [pinned.dtype], pinned, result)
        return
    early.begin(result)
    strategy, smoke = examples_for(cell, plan).filter(allowed), smoke_example(cell, plan.layers_in(cell))
    found = search(cell, strategy, max_examples=plan.examples_in(cell), base_seed=plan.seed, on_example=early.look)
    result.join(found)
    if cell.subject.outputs:
        return
    dtypes = [d for d in plan.dtypes if d in cell.dtypes and allowed(replace(smoke, dtype=d))]
    _add_what_follows(cell, dtypes, smoke, result)


def _add_what_follows(cell: Cell, dtypes: Sequence[str], example: Example, result: Search) -> None:
    for finding in follow(cell, run_trial(cell, example), tuple(dtypes)):
        key = f"{finding.check}:{finding.code}" if finding.check else finding.code  # beside one of the same code
        result.findings.setdefault(key, finding)


@dataclass(frozen=True)
class _Plainer:
    """Makes the counterexamples of what is reported plain; what is excused or folded needs none.

    `result` witnesses what is tried on the way, `made` has those that are plain, by their code.
    """

    cell: Cell
    plan: Plan
    known: Sequence[KnownFailure]
    result: Search
    made: dict[str, Sighting] = field(default_factory=dict)

    def __call__(self, finding: Sighting) -> Sighting:
        """Return the finding with a plain counterexample."""
        if finding.check:
            return finding
        if finding.code not in self.made:
            self.made[finding.code] = self._shrunk(finding)
        return self.made[finding.code]

    def _shrunk(self, finding: Sighting) -> Sighting:
        allowed = _allowed(self.cell, self.known)
        strategy = examples_for(self.cell, self.plan).filter(allowed)
        seed, tried = self.plan.seed, self.result
        return shrink(self.cell, strategy, finding, base_seed=seed, tried=tried, allowed=allowed)


def _diagnosis(cell: Cell, result: Search, excused: Callable[[Verdict], Verdict], plain: _Plainer | None) -> Diagnosis:
    """Name the law behind the scales, after the counterexamples of what is reported were made plain.

    What was tried on the way counts as well, so that what is said of the law holds of the counterexample beside it.
    """
    diagnosis = _diagnosed(result.probes)
    if plain is None:
        return diagnosis
    for _ in range(_TURNS):  # another law may fold other findings
        for finding in _reported(result, Symptoms(result, diagnosis)):
            if excused(NamedFinding(cell, finding, diagnosis).verdict(result.examples)).outcome != "xfailed":
                plain(finding)
        diagnosis = _diagnosed(result.probes)
    wrong = plain.made.get(_SCALE)
    shown = probes_of(wrong.observation, cell) if wrong else ()
    return _by_patterns(diagnosis if agrees(diagnosis, list(shown)) else Diagnosis(None, _SCALE), result)


def _by_patterns(diagnosis: Diagnosis, result: Search) -> Diagnosis:
    """Return another diagnosis where only files of which several patterns fit a module are wrong: one of them is taken.

    The factor between the values of two patterns is no law.
    """
    wrong = [labels for labels, codes, _ in result.wrong if _SCALE in codes]
    if diagnosis.trait is None or not wrong or not all(_OVERLAPPING in labels for labels in wrong):
        return diagnosis
    return Diagnosis(None, "LH204", _SEVERAL)


def _diagnosed(probes: Sequence[Probe]) -> Diagnosis:
    return diagnose(probes, unloaded=unloaded(probes))


def _told_if_hidden(cell: Cell, plan: Plan, verdict: Verdict, loads: Sequence[Sighting]) -> Verdict:
    """Return the verdict; with the whole check as its reproduce line where a fresh process shows no fault.

    What was loaded before decides then. `loads` are the faults that one load shows.
    """
    examples = (finding.observation.example for finding in loads if verdict.outcome == "failed")
    example = next((each for each in examples if each.as_json() == verdict.counterexample), None)
    if example is None or not started_anew(cell.asked) or observe(cell, example)[2]:
        return verdict
    whole = f"{cell.command} --max-examples {plan.examples_in(cell)} --seed {plan.seed}"
    rows = tuple(row for row in verdict.rows if row[0] != "reproduce")
    rows += (("alone", _ALONE), ("reproduce", whole))
    return verdict.model_copy(update={"reproduce": whole, "rows": rows})


def _verdicts(
    cell: Cell,
    result: Search,
    diagnosis: Diagnosis,
    excused: Callable[[Verdict], Verdict],
    plain: _Plainer | None,
) -> Iterator[Verdict]:
    """Turn what was found into verdicts; a law that explains a fault speaks for every symptom of it."""
    smoke = [f for f in result.findings.values() if f.family == "smoke"]
    reported: set[str] = set()
    symptoms = Symptoms(result, diagnosis)
    faults = _reported(result, symptoms)
    if cell.subject.outputs:
        faults = [symptoms.of_some_modules(finding) for finding in faults]
    folded = result.findings.keys() - {fault.code for fault in faults}
    for finding in faults:
        fault = NamedFinding(cell, finding, diagnosis, _where(finding, result, folded))
        reported.add(fault.family)
        verdict = excused(fault.verdict(result.examples))
        if plain and verdict.outcome != "xfailed":
            plainest = plain(finding)
            verdict = NamedFinding(cell, plainest, diagnosis, _where(plainest, result, folded)).verdict(result.examples)
        yield verdict
    for family in family_names():
        if family in reported or (smoke and result.examples == 1):
            continue
        if family == "silence" and not cell.heard:
            if tries_silence(cell) and result.examples > 1 and not cell.subject.outputs:
                yield cell.verdict(family, "skipped", title="not judged", reason=NOT_TRIED)
            continue
        if cell.subject.outputs and family not in SEEN:
            yield cell.verdict(family, "skipped", title="not judged", reason=NOT_SEEN)
            continue
        if family in LAW_FAMILIES and _SCALE in folded and symptoms.explained(_SCALE):
            yield cell.verdict(family, "skipped", title="not judged", reason=_OTHER_SCALES)
            continue
        right = passed(cell, family, result.examples, diagnosis if family in LAW_FAMILIES else None)
        yield through_codes(cell, _with_seen(right, result), result.probes)


def _reported(result: Search, symptoms: Symptoms) -> list[Sighting]:
    """Return the findings that are no symptom of another; whatever is folded, a fault that was seen is reported."""
    faults = [f for f in result.findings.values() if f.check or not symptoms.include(f.code)]
    return faults or list(result.findings.values())


def _where(finding: Sighting, result: Search, symptoms: Iterable[str]) -> str:
    """Return what the examples with this fault have in common; of what follows a load there is no saying."""
    if finding.check or finding.code not in result.counts:
        return ""
    return result.only_where(finding.code, symptoms)


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
