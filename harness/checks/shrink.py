"""Shrink a counterexample: one module, the smallest rank and the roundest alpha that still show the same fault."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hypothesis import find
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy

from harness.checks.finding import Finding
from harness.checks.search import judge, quiet_settings
from harness.checks.trial import Cell, run_trial
from harness.example import Example, Target

_Number = TypeVar("_Number", int, float)
_SECONDS = 60.0  # only a slow subject meets it: the number of trials keeps the result the same everywhere
_TRIALS, _TRIALS_BY_HAND = 250, 100
_EXAMPLES = 400
_RANKS = (2, 1, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48, 64)  # plainest first
_ALPHAS = (1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 0.5, 1.5, 2.5, 0.25, -1.0, -0.5)


@dataclass
class _Trials:
    """Which examples show the fault of `finding`; `left` more may be run until `deadline`."""

    cell: Cell
    finding: Finding
    left: int = _TRIALS
    deadline: float = field(default_factory=lambda: time.monotonic() + _SECONDS)
    seen: dict[Example, Finding | None] = field(default_factory=dict)

    def fails(self, example: Example) -> bool:
        """Tell whether `example` shows the same fault; an example that can no longer be run does not."""
        if example not in self.seen and self.left > 0 and time.monotonic() < self.deadline:
            self.left -= 1
            found = judge(self.cell, run_trial(self.cell, example))
            self.seen[example] = next((f for f in found if f.code == self.finding.code), None)
        return self.seen.get(example) is not None


def shrink(
    cell: Cell,
    examples: SearchStrategy[Example],
    finding: Finding,
    *,
    base_seed: int,
    allowed: Callable[[Example], bool] = lambda example: True,
) -> Finding:
    """Return the same fault on the simplest example found within a time limit, or `finding` itself.

    Hypothesis shrinks what it draws, and stops where no small step leads on (a rank divisible by 3 next to 48, say);
    plainer numbers are then tried one by one. `allowed` says which examples may be tried.
    """
    if finding.code == "LH901" and "time limit" in finding.fact:
        return finding  # every attempt would cost the whole limit again
    trials = _Trials(cell, finding)
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
