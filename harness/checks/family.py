"""The registry of what is checked: a file of `families/` declares a family of properties on its functions."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal, TypeVar

from harness.checks.cell import Cell
from harness.checks.observation import Observation

LAW_FAMILIES = ("scale", "strength")  # a law that explains the scales says which of the two is at fault
Need = Literal["unload", "set_strength", "additive", "no bias", "any strength"]
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Finding:
    """One fault seen in one observation, before it becomes a verdict.

    `modules` are the failing ones, worst first; `fact` is the measured fact of the first line of the failure. `faint`:
    the change is so small beside rounding that its direction, too, may be at fault.
    """

    code: str
    observation: Observation
    modules: tuple[str, ...] = ()
    fact: str = ""
    faint: bool = False

    @property
    def family(self) -> str:
        """The family this fault belongs to."""
        return next(check.family for check in checks() if self.code in check.codes)


Judge = Callable[[Observation], Iterable[Finding]]
Sequel = Callable[[Cell, Observation, tuple[str, ...]], Iterable[Finding]]


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

    def register(function: Judge) -> Judge:
        _CHECKS.append(Check(family, finds, codes, judge=function))
        return function

    return register


def follows(
    family: str, *, finds: str, codes: tuple[str, ...], requires: Need | None = None
) -> Callable[[Sequel], Sequel]:
    """Register the decorated function for what comes after one load, in cells that have what it `requires`."""

    def register(function: Sequel) -> Sequel:
        _CHECKS.append(Check(family, finds, codes, requires, sequel=function))
        return function

    return register


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


def judge(observation: Observation) -> list[Finding]:
    """Apply every family to one observation."""
    return [finding for check in checks() if check.judge for finding in check.judge(observation)]


def follow(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Finding]:
    """Yield what the load behind `once` leaves behind that it should not; nothing where the load itself is broken."""
    if once.raised or not all(fits[0].finite for fits in once.fits.values()):
        return  # said already
    for check in checks():
        if check.sequel and has(cell, check.requires):
            yield from check.sequel(cell, once, dtypes)


def has(cell: Cell, need: Need | None) -> bool:
    """Whether a cell has what a check, or a step of one, requires."""
    declared, variant = cell.subject.declaration, cell.variant
    known = {
        "unload": declared.unload is not None,
        "set_strength": declared.set_strength is not None,
        "additive": variant.additive,
        "no bias": not variant.bias,
        "any strength": not variant.strengths,
    }
    return need is None or known[need]
