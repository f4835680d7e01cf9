"""Bent inputs: scales that are right but for one input, each of whose values counts as another number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from harness.law.probe import Probe
from harness.law.traits import About, Trait

_AGAIN, _SHOWN = 2, 3  # bent values, and what each was met with, before one input is said to be at fault
_ALIKE = 1e-3
_ROUNDINGS = 1.5  # times the tolerance: what a value counts as was measured too


@dataclass(frozen=True)
class _Input:
    """One input: its `value`, what it was met with `beside`; the scale is `unit` times a `power` of the value."""

    code: str
    about: About
    value: Callable[[Probe], float]
    beside: Callable[[Probe], Hashable]
    unit: Callable[[Probe], float]
    power: Callable[[Probe], float] = lambda probe: 1.0

    def trait(self, wrong: Sequence[Probe], every: Sequence[Probe]) -> Trait | None:
        """Return the trait when each value counts as one number, whatever else differs, and several as others."""
        met: dict[float, set[Hashable]] = defaultdict(set)
        for probe in wrong:
            met[self.value(probe)].add(self.beside(probe))
        counts = {value: self._counted([p for p in every if self.value(p) == value]) for value in met}
        often = [value for value, others in met.items() if len(others) >= _AGAIN]
        if len(often) < _AGAIN or None in counts.values() or _one_factor(counts):
            return None
        said = ", ".join(f"{value:.6g} counts as {counts[value]:.4g}" for value in often[:_SHOWN])
        return Trait(f"{self.about} {said}, ...", self.about)

    def _counted(self, group: Sequence[Probe]) -> float | None:
        """Return what a value counts as in every probe of its group, None when that differs."""
        finest = min(group, key=lambda p: p.tolerance / abs(p.measured or 1.0))
        share = finest.measured / (self.unit(finest) or 1.0)
        if share <= 0 and self.power(finest) != 1:
            return None
        counted = share ** (1 / self.power(finest)) if self.power(finest) != 1 else share
        return counted if all(self._fits(p, counted) for p in group) else None

    def _fits(self, p: Probe, counted: float) -> bool:
        there: float = self.unit(p) * counted ** self.power(p)
        return abs(p.measured - there) <= _ROUNDINGS * p.tolerance


def _one_factor(counts: Mapping[float, float | None]) -> bool:
    """Whether every value counts as the same multiple of itself, not 0: that is a factor on the scale, of no input."""
    shares = [counted / value for value, counted in counts.items() if counted and value]
    return len(shares) == len(counts) and max(shares) - min(shares) <= _ALIKE * abs(max(shares, key=abs))


_INPUTS = (
    _Input(
        "LH207",
        "strength",
        lambda p: p.strength,
        lambda p: (p.alpha, p.rank),
        lambda p: p.expected / p.strength if p.strength else 0.0,
    ),
    _Input("LH205", "alpha", lambda p: _alpha(p), lambda p: p.rank, lambda p: p.scale_of(1.0, p.rank)),
    _Input(
        "LH209",
        "rank",
        lambda p: p.rank,
        lambda p: p.alpha,
        lambda p: p.scale_of(_alpha(p), 1),
        lambda p: -0.5 if p.root else -1.0,
    ),
)


def bent(wrong: Sequence[Probe], every: Sequence[Probe]) -> tuple[str, Trait] | None:
    """Return the code and the trait of the one input that is at fault in all `wrong` probes, None when two may be.

    A missing alpha stands for the rank, where it is not right as it is.
    """
    asked = [p for p in every if p.strength and not (p.alpha is None and p.right)]
    wrong = [p for p in wrong if p.strength]
    found = [(each.code, trait) for each in _INPUTS if (trait := each.trait(wrong, asked))]
    return found[0] if len(found) == 1 else None


def _alpha(probe: Probe) -> float:
    return float(probe.rank) if probe.alpha is None else probe.alpha
