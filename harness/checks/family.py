"""The registry of what is checked: a file of `families/` declares a family of properties on its functions.

Here is all that such a file needs: `judges` for what every load shows, `follows` for what comes after one, scenarios
for the latter, and the findings of both.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypeVar

from harness.checks.cell import Cell
from harness.checks.observation import Observation, changed_otherwise, wrong_direction
from harness.checks.trial import Step, load, rebuild, run_trial
from harness.measure.compare import Fit

LAW_FAMILIES = ("scale", "strength")  # a law that explains the scales says which of the two is at fault
Need = Literal["unload", "set_strength", "additive", "no bias", "any strength"]


@dataclass(frozen=True)
class Sighting:
    """One fault seen in one observation, before it becomes a verdict.

    `modules` are the failing ones, worst first; `fact` is the measured fact of the first line of the failure. `faint`:
    the change is so small beside rounding that its direction, too, may be at fault. `data` goes into the verdict.
    `place` is the cell that it was seen in, where that is not the one that is checked.
    """

    code: str
    observation: Observation
    modules: tuple[str, ...] = ()
    fact: str = ""
    faint: bool = False
    unmoved: bool = False
    check: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    place: Cell | None = None

    @property
    def family(self) -> str:
        """The family this fault belongs to: that of its code, unless another `check` met it."""
        return self.check or next(check.family for check in checks() if self.code in check.codes)


Judge = Callable[[Observation], Iterable[Sighting]]
Sequel = Callable[[Cell, Observation, tuple[str, ...]], Iterable[Sighting]]
F = TypeVar("F", Judge, Sequel)


@dataclass(frozen=True)
class Check:
    """One property of a `family`: what it `finds`, in README's words, the `codes` it may give and what it `requires`.

    `judge` looks at every load. `sequel` goes on from one that was right, in cells that have what it requires: it gets
    the cell, what one load of an example at strength 1 showed, and the dtypes to try.
    """

    family: str
    finds: str
    codes: tuple[str, ...]
    requires: Need | None = None
    judge: Judge | None = None
    sequel: Sequel | None = None

    @property
    def order(self) -> tuple[bool, str]:
        """Sort key: a call that failed (LH9xx) comes before all else, then the codes count up."""
        return self.codes[0] < "LH9", self.codes[0]


_CHECKS: list[Check] = []


def judges(family: str, *, finds: str, codes: tuple[str, ...]) -> Callable[[Judge], Judge]:
    """Register the decorated function for every observation."""

    return lambda function: _register(function, Check(family, finds, codes, judge=function))


def follows(
    family: str, *, finds: str, codes: tuple[str, ...], requires: Need | None = None
) -> Callable[[Sequel], Sequel]:
    """Register the decorated function for what comes after one load, in cells that have what it `requires`."""

    return lambda function: _register(function, Check(family, finds, codes, requires, sequel=function))


def _register(function: F, check: Check) -> F:
    _CHECKS.append(check)
    return function


@cache
def checks() -> tuple[Check, ...]:
    """Return all that the modules of `harness.checks.families` declare, ordered by family."""
    from harness.checks import families

    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        import_module(module.name)
    return tuple(sorted(_CHECKS, key=lambda check: check.order))


def family_names() -> tuple[str, ...]:
    """Return the names of the families, in the order in which they are reported."""
    return tuple(dict.fromkeys(check.family for check in checks()))


def judge(observation: Observation) -> list[Sighting]:
    """Apply every family to one observation."""
    return [finding for check in checks() if check.judge for finding in check.judge(observation)]


def follow(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """Yield what the load behind `once` leaves behind that it should not; nothing where the load itself is broken."""
    if once.raised or once.unsteady or once.training or not all(fits[0].finite for fits in once.fits.values()):
        return  # said already
    if forgetful := _not_the_same_again(cell, once):
        yield forgetful  # nothing that follows can be put down to its own steps
        return
    for check in checks():
        if check.sequel and has(cell, check.requires):
            yield from check.sequel(cell, once, dtypes)


def _not_the_same_again(cell: Cell, once: Observation) -> Sighting | None:
    """Return LH408 when the same file is another LoRA in a second fresh model, LH402 where it has another scale there.

    LH9xx where it fails there.
    """
    again = (load(), rebuild(1), load()) if not once.file_changed else (load(),)
    seen = run_trial(cell, once.example, again)
    if seen.raised:
        return Sighting(seen.raised.code, seen, fact=f"{seen.raised.what}; the same file loaded a moment before")
    names = changed_otherwise(once, seen)
    what = "layers are not as they were when the same file was loaded into the same model before"
    code = "LH408" if any(wrong_direction(seen.fits[name][0]) for name in names) else "LH402"
    return Sighting(code, seen, tuple(names), f"{len(names)} of {len(once.fits)} {what}") if names else None


def has(cell: Cell, need: Need | None) -> bool:
    """Whether a cell has what a check, or a step of one, requires."""
    declared, variant = cell.subject.declaration, cell.variant
    known = {
        "unload": declared.unload is not None,
        "set_strength": declared.set_strength is not None,
        "additive": variant.additive,
        "no bias": not variant.bias,
        "any strength": not cell.strengths,
    }
    return need is None or known[need]


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
        plain = all(step.times in (1, None) or step == rebuild(2) for step in self.steps)
        layers = cell.bench.layers.values()
        if any(step == rebuild(2) for step in self.steps) and any(layer.codes or layer.computed for layer in layers):
            return False  # no arithmetic on codes, or on what is computed anew, makes a model of other weights
        return has(cell, self.requires) and (plain or has(cell, "any strength"))


def first_wrong(
    cell: Cell, once: Observation, scenarios: Iterable[Scenario], *, may_raise: bool = False
) -> Iterator[Sighting]:
    """Yield the finding of the first possible scenario that goes wrong; `once` is what one load showed.

    `may_raise`: refusing these steps is a documented choice of several loaders.
    """
    for scenario in scenarios:
        found = try_out(cell, once, scenario, may_raise=may_raise)
        if isinstance(found, Sighting):
            yield found
            return


def try_out(cell: Cell, once: Observation, scenario: Scenario, *, may_raise: bool = False) -> Sighting | float | None:
    """Return what is wrong after a scenario, else the right multiple that is there; None where there is no saying."""
    if not scenario.possible(cell):
        return None
    seen = run_trial(cell, once.example, scenario.steps)
    if seen.raised:
        what = f"{scenario.what} raised: {seen.raised.what}"
        return None if may_raise else Sighting(scenario.code, seen, fact=what)
    clear = {n: f[0] for n, f in seen.fits.items() if not wrong_direction(once.fits[n][0])}  # the others have no scale
    first = {name: once.fits[name][0].scale for name in clear}
    there = (times for times in scenario.right if all(near(fit, times * first[name]) for name, fit in clear.items()))
    right = next(there, None)
    return Sighting(scenario.code, seen, *_worst(first, clear, scenario)) if right is None else right


def _worst(first: Mapping[str, float], seen: Mapping[str, Fit], scenario: Scenario) -> tuple[tuple[str, ...], str]:
    off = {name: _distance(fit.scale, first[name], scenario.right) for name, fit in seen.items()}
    name = max(off, key=lambda each: off[each])
    wanted = " or ".join(f"{times * first[name]:.4g}" for times in scenario.right)
    return (name,), f"scale {seen[name].scale:.4g} after {scenario.what}, but should be {wanted}"


def _distance(scale: float, first: float, right: Sequence[float]) -> float:
    return min(abs(scale - times * first) for times in right)


def near(fit: Fit, wanted: float) -> bool:
    """Tell whether a measured scale is `wanted`, within four times its tolerance."""
    return abs(fit.scale - wanted) <= 4 * fit.tolerance.scale
