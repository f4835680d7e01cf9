"""Scenarios: what is done after one load, and the multiples of that load's scale any of which is right then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.checks.cell import Cell
from harness.checks.family import Finding, Need, has
from harness.checks.observation import Observation, wrong_direction
from harness.checks.trial import Step, rebuild, run_trial
from harness.measure.compare import Fit


@dataclass(frozen=True)
class Scenario:
    """`steps` on a fresh model, `what` they are in words, the `right` multiples after them, the `code` of others."""

    code: str
    steps: tuple[Step, ...]
    right: tuple[float, ...]
    what: str
    requires: Need | None = None

    def possible(self, cell: Cell) -> bool:
        """Whether a loader can be asked for this in `cell`."""
        plain = all(step.times == 1 or step == rebuild(2) for step in self.steps)
        return has(cell, self.requires) and (plain or has(cell, "any strength"))


def first_wrong(
    cell: Cell, once: Observation, scenarios: Iterable[Scenario], *, may_raise: bool = False
) -> Iterator[Finding]:
    """Yield the finding of the first possible scenario that goes wrong; `once` is what one load showed.

    `may_raise`: refusing these steps is a documented choice of several loaders.
    """
    for scenario in scenarios:
        if scenario.possible(cell) and (found := _finding(cell, once, scenario, may_raise)):
            yield found
            return


def _finding(cell: Cell, once: Observation, scenario: Scenario, may_raise: bool) -> Finding | None:
    seen = run_trial(cell, once.example, scenario.steps)
    if seen.raised:
        what = f"{scenario.what} raised: {seen.raised.what}"
        return None if may_raise else Finding(scenario.code, seen, fact=what)
    clear = {n: f[0] for n, f in seen.fits.items() if not wrong_direction(once.fits[n][0])}  # the others have no scale
    first = {name: once.fits[name][0].scale for name in clear}
    if any(all(_near(fit, times * first[name]) for name, fit in clear.items()) for times in scenario.right):
        return None
    return Finding(scenario.code, seen, *_worst(first, clear, scenario))


def _worst(first: Mapping[str, float], seen: Mapping[str, Fit], scenario: Scenario) -> tuple[tuple[str, ...], str]:
    off = {name: _distance(fit.scale, first[name], scenario.right) for name, fit in seen.items()}
    name = max(off, key=lambda each: off[each])
    wanted = " or ".join(f"{times * first[name]:.4g}" for times in scenario.right)
    return (name,), f"scale {seen[name].scale:.4g} after {scenario.what}, but should be {wanted}"


def _distance(scale: float, first: float, right: Sequence[float]) -> float:
    return min(abs(scale - times * first) for times in right)


def _near(fit: Fit, wanted: float) -> bool:
    return abs(fit.scale - wanted) <= 4 * fit.tolerance.scale
