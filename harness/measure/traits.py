"""Traits of a probe: the conditions under which a loader may be wrong while it is right everywhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from harness.measure.probes import Probe

TRAITS: dict[str, Callable[[Probe], bool]] = {
    "bfloat16": lambda p: p.dtype == "bfloat16",
    "negative alpha": lambda p: (p.alpha or 0) < 0,
    "alpha = 0": lambda p: p.alpha == 0,
    "no alpha in the file": lambda p: all(alpha is None for alpha in p.alphas),
    "no alpha for this module while others have one": lambda p: (
        p.alpha is None and any(a is not None for a in p.alphas)
    ),
    "fractional alpha": lambda p: p.alpha is not None and p.alpha != int(p.alpha),
    "0 < alpha < 1": lambda p: p.alpha is not None and 0 < p.alpha < 1,
    "alpha > rank": lambda p: (p.alpha or 0) > p.rank,
    "alpha < rank": lambda p: p.alpha is not None and p.alpha < p.rank,
    "rank = 1": lambda p: p.rank == 1,
    "rank > 64": lambda p: p.rank > 64,
    "rank > 32": lambda p: p.rank > 32,
    "odd rank": lambda p: p.rank % 2 == 1,
    "rank divisible by 3": lambda p: p.rank % 3 == 0,
    "rank divisible by 4": lambda p: p.rank % 4 == 0,
    "several ranks in the file": lambda p: len(set(p.ranks)) > 1,
    "several alphas in the file": lambda p: len(set(p.alphas)) > 1,
    "one module in the file": lambda p: len(p.ranks) == 1,
    "first module of the file": lambda p: p.index == 0,
    "last module of the file": lambda p: p.index == len(p.ranks) - 1,
    "every second module of the file (1st, 3rd, ...)": lambda p: p.index % 2 == 0,
    "every second module of the file (2nd, 4th, ...)": lambda p: p.index % 2 == 1,
    "square module": lambda p: p.square,
    "rectangular module": lambda p: not p.square,
    "merged q/k/v": lambda p: p.fused,
    "strength = 0": lambda p: p.strength == 0,
    "negative strength": lambda p: p.strength < 0,
    "strength > 1": lambda p: p.strength > 1,
    "strength other than 1": lambda p: p.strength != 1,
    "fractional strength": lambda p: p.strength != int(p.strength),
    "keys permuted": lambda p: p.permuted,
}

_VALUES, _AGAIN = 3, 2  # wrong values of alpha, and how often each must have been met, before alpha is said to decide
_FINE = 1e-3


def common_trait(wrong: Sequence[Probe], right: Sequence[Probe]) -> str | None:
    """Return the trait that every wrong probe has and no right one, or None."""
    if not wrong or not right:
        return None
    for name, holds in TRAITS.items():
        if all(map(holds, wrong)) and not any(map(holds, right)):
            return name
    return None


def alpha_decides(wrong: Sequence[Probe], right: Sequence[Probe]) -> str | None:
    """Return a trait when a value of alpha is either always wrong or always right, whatever else differs, or None.

    It must have been met at several ranks and strengths: three wrong values, and three right ones, twice each. A scale
    that is right only within a coarse tolerance says nothing.
    """
    fine = [p for p in right if p.tolerance <= _FINE * abs(p.expected)]
    bad, good = (Counter(p.alpha for p in {_inputs(p): p for p in part}.values()) for part in (wrong, fine))
    if bad.keys() & good.keys():
        return None
    often = [[value for value, count in values.most_common() if count >= _AGAIN] for values in (bad, good)]
    if min(map(len, often)) < _VALUES:
        return None
    wrongly, rightly = (
        ", ".join(f"{value:g}" if value is not None else "none" for value in v[:_VALUES]) for v in often
    )
    return f"alpha is one of certain values ({wrongly}, ..., not {rightly}, ...)"


def _inputs(probe: Probe) -> tuple[float | None, int, float]:
    return probe.alpha, probe.rank, probe.strength
