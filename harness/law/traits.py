"""Traits of a probe: the conditions under which a loader may be wrong while it is right everywhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from harness.law.probe import Probe

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

_VALUES, _AGAIN = 3, 2  # wrong values, and how often each must have been met, before it is said to decide
_FINE = 1e-3
_BORROWED = 6  # wrong scales that are those of other modules by chance are fewer


def common_trait(wrong: Sequence[Probe], right: Sequence[Probe]) -> str | None:
    """Return the trait that every wrong probe has and no right one, or None."""
    if not wrong or not right:
        return None
    for name, holds in TRAITS.items():
        if all(map(holds, wrong)) and not any(map(holds, right)):
            return name
    return None


def one_input_decides(name: str, wrong: Sequence[Probe], right: Sequence[Probe]) -> str | None:
    """Return a trait when a value of `alpha` or `strength` is always wrong or always right, whatever else differs.

    It must have been met with several others: three wrong values, and three right ones, twice each. A scale that is
    right only within a coarse tolerance says nothing.
    """
    fine = [p for p in right if p.tolerance <= _FINE * abs(p.expected)]
    bad, good = (Counter(getattr(p, name) for p in {_inputs(p): p for p in part}.values()) for part in (wrong, fine))
    if bad.keys() & good.keys():
        return None
    often = [[value for value, count in values.most_common() if count >= _AGAIN] for values in (bad, good)]
    if min(map(len, often)) < _VALUES:
        return None
    wrongly, rightly = (", ".join("none" if v is None else f"{v:g}" for v in values[:_VALUES]) for values in often)
    return f"{name} is one of certain values ({wrongly}, ..., not {rightly}, ...)"


def borrowed(wrong: Sequence[Probe]) -> str | None:
    """Return a trait when every wrong scale is the one that another module's alpha, or rank, would give."""
    if len(wrong) < _BORROWED:
        return None
    for name, scales in (("alpha", _with_alphas), ("rank", _with_ranks)):
        if all(any(abs(p.measured - scale) <= p.tolerance for scale in scales(p)) for p in wrong):
            return f"another module has another {name}, and that is used"
    return None


def _with_alphas(probe: Probe) -> Iterator[float]:
    """Yield the scale with every alpha of the file; a module that has none counts as alpha = rank."""
    pairs = zip(probe.alphas, probe.ranks, strict=True)
    return (probe.scale_of(a if a is not None else float(r), probe.rank) for a, r in pairs)


def _with_ranks(probe: Probe) -> Iterator[float]:
    return (probe.scale_of(probe.alpha, rank) for rank in probe.ranks)


def _inputs(probe: Probe) -> tuple[float | None, int, float]:
    return probe.alpha, probe.rank, probe.strength
