"""Search for violations: draw examples, judge each with every family, make the counterexamples plain.

A counterexample is plain with one module, the smallest rank and the roundest alpha that still show the same fault.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, event, find, given, seed, settings
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy

from harness.checks.cell import Cell
from harness.checks.family import Sighting, judge
from harness.checks.observation import Observation, probes_of
from harness.checks.outputs import judge_outputs, observe_outputs
from harness.checks.trial import run_trial
from harness.example import Example, Target
from harness.law.bounds import beyond
from harness.law.probe import Probe

_Number = TypeVar("_Number", int, float)
_MAX_RAISED = 3  # a subject that keeps raising, or hanging, tells nothing new
_SECONDS = 60.0  # only a slow subject meets it: the number of trials keeps the result the same everywhere
_TRIALS, _TRIALS_BY_HAND = 250, 100
_EXAMPLES = 400
_CHANCE = 0.001
_WHERE = {"model": "{} models", "file": "{} files", "patterns": "patterns in the style {}", "keys": "keys {}"}
_RANKS = (2, 1, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48, 64)  # plainest first
_ALPHAS = (1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 0.5, 1.5, 2.5, 0.25, -1.0, -0.5)


@dataclass
class Search:
    """What a search found: the first observation per code, every probe, and how many examples ran.

    `zero_alpha` says how alpha = 0 was read, `labels` counts the examples by what they are, `drawn` those that were
    drawn at random; `wrong` has the labels and the codes of those that showed anything, and whether they were drawn;
    `modules` the rank of each module whose change shows, and the codes of what was seen in it.
    """

    findings: dict[str, Sighting] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    examples: int = 0
    zero_alpha: set[str] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[tuple[str, ...], frozenset[str], bool]] = field(default_factory=list)
    modules: list[tuple[int, frozenset[str]]] = field(default_factory=list)

    def add(
        self, observation: Observation, probes: Sequence[Probe], findings: Sequence[Sighting], *, drawn: bool = False
    ) -> None:
        """Keep what one example showed, which was `drawn` at random or planned."""
        self.examples += 1
        self.zero_alpha |= observation.zero_alpha
        self.witness(observation, probes, findings, drawn=drawn)
        for finding in findings:
            self.keep(finding)
            self.counts[finding.code] = self.counts.get(finding.code, 0) + 1

    def witness(
        self, observation: Observation, probes: Sequence[Probe], findings: Sequence[Sighting], *, drawn: bool = False
    ) -> None:
        """Keep what an example says of a law and of its condition, and no finding of it."""
        self.probes.extend(probes)
        labels = labels_of(observation.example)
        self.labels.update(labels)
        self.drawn.update(labels if drawn else ())
        for target in filter(observation.shows, observation.example.targets):
            seen = frozenset(finding.code for finding in findings if target.name in finding.modules)
            self.modules.append((target.rank, seen))
        if findings:
            self.wrong.append((labels, frozenset(finding.code for finding in findings), drawn))

    def keep(self, finding: Sighting) -> None:
        """Let the first finding of a code stand for it, or the first that is not faint, of modules that changed."""
        kept = self.findings.get(finding.code)
        if kept is None or (finding.faint, finding.unmoved) < (kept.faint, kept.unmoved):
            self.findings[finding.code] = finding

    def join(self, later: Search) -> None:
        """Add what another search found after this one."""
        for code, finding in later.findings.items():
            self.keep(finding)
            self.counts[code] = self.counts.get(code, 0) + later.counts[code]
        self.probes += later.probes
        self.examples += later.examples
        self.zero_alpha |= later.zero_alpha
        self.labels += later.labels
        self.drawn += later.drawn
        self.wrong += later.wrong
        self.modules += later.modules

    def only_where(self, code: str, symptoms: Iterable[str] = ()) -> str:
        """Return what every example with this fault is and others are not, in words; empty when nothing is sure.

        `symptoms` are codes of what may be the same fault.
        """
        codes = {code, *symptoms}
        shown = [(labels, drawn) for labels, others, drawn in self.wrong if codes & others]
        wrong = Counter(label for labels, _ in shown for label in labels)
        by_chance = Counter(label for labels, drawn in shown if drawn for label in labels)
        shares = {kind: self._share(wrong, by_chance, kind) for kind in _WHERE}
        sure = {kind: share for kind, share in shares.items() if share}
        alone = [kind for kind, share in sure.items() if share == 1]
        return " and ".join(_where(wrong, kind) for kind in alone[:1] or sure) or self._by_rank(codes)

    def _by_rank(self, codes: AbstractSet[str]) -> str:
        """Return from which rank on, or up to which, every module has the fault and no other one has; or nothing."""
        bad = {rank for rank, seen in self.modules if codes & seen}
        good = {rank for rank, seen in self.modules if not codes & seen}
        return beyond("a rank", bad, good) or ""

    def _share(self, wrong: Counter[str], by_chance: Counter[str], kind: str) -> float:
        """Return how many examples are wrong of those that are like the wrong ones; 0 when the rest may be chance.

        Where some are right, those that were drawn decide: planned ones are alike in more than what has a label.
        """
        here = [label for label in wrong if label.startswith(f"{kind} ")]
        share = _share(self.labels, wrong, kind, here)
        return share if share in (0, 1) else _share(self.drawn, by_chance, kind, here)


def _share(every: Counter[str], wrong: Counter[str], kind: str, here: Sequence[str]) -> float:
    """Return how many are `wrong` of the examples that are `here`; 0 when that only those are may be chance.

    Fisher's exact test: how often would all wrong ones be among these if being wrong had nothing to do with it?
    """
    among, bad = (sum(counts[label] for label in here) for counts in (every, wrong))
    number = sum(count for label, count in every.items() if label.startswith(f"{kind} "))
    return bad / among if among and math.comb(among, bad) / math.comb(number, bad) < _CHANCE else 0.0


def _where(wrong: Counter[str], kind: str) -> str:
    words = (label.removeprefix(f"{kind} ") for label in wrong if label.startswith(f"{kind} "))
    return _WHERE[kind].format(" or ".join(sorted(words)))


def labels_of(example: Example) -> tuple[str, ...]:
    """Return what an example is, in words: dtypes, ranks, alphas, patterns, order of the keys, strength."""
    ranks, alphas = ({getattr(t, name) for t in example.targets} for name in ("rank", "alpha"))
    strength = {0.0: "0", 1.0: "1"}.get(example.strength, "negative" if example.strength < 0 else "another")
    return (
        f"model {example.dtype}",
        f"file {example.file_dtype}",
        "one rank" if len(ranks) == 1 else "several ranks",
        "no alpha" if alphas == {None} else "some alphas missing" if None in alphas else "alpha everywhere",
        f"patterns {example.patterns}",
        "keys permuted" if example.key_seed else "keys in order",
        f"strength {strength}",
    )


def observe(cell: Cell, example: Example) -> tuple[Observation, list[Probe], list[Sighting]]:
    """Run one example and return what it showed, as an observation, as probes and as findings."""
    if cell.subject.outputs:
        seen = observe_outputs(cell, example)
        return seen, list(probes_of(seen, cell)), judge_outputs(seen)
    observation = run_trial(cell, example)
    return observation, list(probes_of(observation, cell)), judge(observation)


def search(
    cell: Cell,
    examples: SearchStrategy[Example],
    *,
    max_examples: int,
    base_seed: int,
    until: str | None = None,
    on_example: Callable[[Search], object] = lambda found: None,
) -> Search:
    """Run `max_examples` examples, collecting every kind of finding; it stops early only when `until` is found.

    `on_example` is shown what was found so far.
    """
    result = Search()

    def collect(example: Example) -> None:
        if until in result.counts:
            raise _FoundError
        for label in labels_of(example):
            event(label)
        if result.counts.get("LH901", 0) < _MAX_RAISED:
            result.add(*observe(cell, example), drawn=True)
            on_example(result)

    run: Callable[[], None] = seed(base_seed)(
        quiet_settings(max_examples, (Phase.generate,))(given(example=examples)(collect))
    )
    with suppress(_FoundError):
        run()
    return result


class _FoundError(Exception):
    """What was looked for is found: Hypothesis draws no more."""


def quiet_settings(max_examples: int, phases: Sequence[Phase] = (Phase.generate, Phase.shrink)) -> Any:
    """Return Hypothesis settings without a database, a deadline, health checks or prints."""
    return settings(
        max_examples=max_examples,
        phases=phases,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class _Trials:
    """Which examples show the fault of `finding`; `left` more may be run until `deadline`. `tried` witnesses them."""

    cell: Cell
    finding: Sighting
    tried: Search
    left: int = _TRIALS
    deadline: float = field(default_factory=lambda: time.monotonic() + _SECONDS)
    seen: dict[Example, Sighting | None] = field(default_factory=dict)

    def fails(self, example: Example) -> bool:
        """Tell whether `example` shows the same fault; an example that can no longer be run does not."""
        if not _is_taken(self.cell, example):
            return False
        if example not in self.seen and self.left > 0 and time.monotonic() < self.deadline:
            self.left -= 1
            observation, probes, found = observe(self.cell, example)
            self.tried.witness(observation, probes, found)
            self.seen[example] = next(filter(self._is_same, found), None)
        return self.seen.get(example) is not None

    def _is_same(self, other: Sighting) -> bool:
        alike = _raised(other) == _raised(self.finding)
        return other.code == self.finding.code and alike and (self.finding.unmoved or not other.unmoved)


def _is_taken(cell: Cell, example: Example) -> bool:
    """Whether every module has the one rank, and the one alpha, that the loader says it takes."""
    return all(len({getattr(target, name) for target in example.targets}) == 1 for name in cell.uniform)


def _raised(finding: Sighting) -> str:
    """Return which exception it is, nothing where none is."""
    raised = finding.observation.raised
    return raised.what.partition(":")[0] if raised else ""


def shrink(
    cell: Cell,
    examples: SearchStrategy[Example],
    finding: Sighting,
    *,
    base_seed: int,
    tried: Search,
    allowed: Callable[[Example], bool] = lambda example: True,
) -> Sighting:
    """Return the same fault on the simplest example found within a time limit, or `finding` itself.

    Hypothesis shrinks what it draws, and stops where no small step leads on (a rank divisible by 3 next to 48, say);
    plainer numbers are then tried one by one. `allowed` says which examples may be tried; `tried` witnesses them.
    """
    if (raised := finding.observation.raised) and raised.timed_out:
        return finding  # every attempt would cost the whole limit again
    trials = _Trials(cell, finding, tried)
    try:
        simplest = find(examples, trials.fails, settings=quiet_settings(_EXAMPLES), random=random.Random(base_seed))
    except NoSuchExample:
        return finding
    trials.left = _TRIALS_BY_HAND
    return trials.seen[simplified(simplest, lambda e: allowed(e) and trials.fails(e))] or finding


def simplified(example: Example, fails: Callable[[Example], bool]) -> Example:
    """Take the first plainer example that still fails, until none does."""
    while (plainer := next(filter(fails, _plainer(example)), None)) is not None:
        example = plainer
    return example


def _plainer(example: Example) -> Iterator[Example]:
    """Yield examples with a module less, then with a plainer rank or alpha in one module."""
    targets = example.targets
    for i in range(len(targets) if len(targets) > 1 else 0):
        yield replace(example, targets=targets[:i] + targets[i + 1 :])
    for i, target in enumerate(targets):
        for other in _plainer_targets(target):
            yield replace(example, targets=(*targets[:i], other, *targets[i + 1 :]))


def _plainer_targets(target: Target) -> Iterator[Target]:
    """Yield a module with each plainer rank, then with each plainer alpha; one without alpha stays without."""
    for rank in _before(_RANKS, target.rank):
        if rank < target.rank or target.rank == 1:
            yield replace(target, rank=rank)
    for alpha in () if target.alpha is None else _before(_ALPHAS, target.alpha):
        yield replace(target, alpha=alpha)


def _before(plain: tuple[_Number, ...], value: _Number) -> tuple[_Number, ...]:
    """Return what stands before `value` in the list, all of it when `value` does not stand there."""
    return plain[: plain.index(value)] if value in plain else plain
