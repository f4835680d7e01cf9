"""Bounds: wrong probes that all behave as if alpha, the strength, alpha / rank or the rank were one number, or 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median

from harness.law.probe import Probe
from harness.law.traits import About, Trait

_DIFFERENT = 3  # values that are all taken for one number by chance are fewer


@dataclass(frozen=True)
class _Bound:
    """A number of a probe that may be bounded: the scale is `unit` times a `power` of its `value`.

    `text` has `{bound}` and `{side}`. What a bound `caps` is only ever made smaller by it, whatever its sign.
    """

    code: str
    about: About
    text: str
    value: Callable[[Probe], float]
    unit: Callable[[Probe], float]
    power: Callable[[Probe], float] = lambda probe: 1.0
    caps: bool = False

    def trait(self, wrong: Sequence[Probe], right: Sequence[Probe]) -> Trait | None:
        """Return the trait of `wrong` probes that all behave as if the value were one number; none denies it."""
        sizes = [p.measured / self.unit(p) for p in wrong]
        if any(size <= 0 and self.power(p) < 0 for p, size in zip(wrong, sizes, strict=True)):
            return None
        values = [self.value(p) for p in wrong]
        bound = median(size ** (1 / self.power(p)) for p, size in zip(wrong, sizes, strict=True))
        if len({round(value, 6) for value in values}) < _DIFFERENT or not self._is_one_side(values, bound):
            return None
        above, sides = min(values) >= bound, set(map(self._side, wrong))
        also = (p for p in right if (self.value(p) >= bound if above else self.value(p) <= bound))
        asked = (p for p in also if p.alpha is not None or self.about != "rank")  # a missing one may be scale 1
        beyond = (p for p in asked if self._side(p) in sides)
        if any(abs(p.measured - self.unit(p) * bound ** self.power(p)) > 1.5 * p.tolerance for p in (*wrong, *beyond)):
            return None
        if self.about == "alpha" and self.caps and all(p.expected * p.strength < 0 for p in wrong):
            bound = -bound
        side = "below" if max(values) <= bound else "above"
        return Trait(self.text.format(bound=f"{bound:.4g}", side=side), self.about)

    def _side(self, p: Probe) -> bool:
        """On which side of zero a cap meets a probe."""
        return self.caps and (p.strength if self.about == "strength" else p.expected * p.strength) > 0

    def _is_one_side(self, values: Sequence[float], bound: float) -> bool:
        return min(values) >= bound > 0 if self.caps else max(values) <= bound or min(values) >= bound


_BOUNDS = (
    _Bound("LH205", "alpha", "alpha beyond {bound}", lambda p: p.alpha or 0.0, lambda p: p.expected / (p.alpha or 1.0)),
    _Bound("LH207", "strength", "strength beyond {bound}", lambda p: p.strength, lambda p: p.expected / p.strength),
    _Bound(
        "LH207",
        "strength",
        "strength beyond {bound} or below -{bound}, which caps it",
        lambda p: abs(p.strength),
        lambda p: p.expected / abs(p.strength),
        caps=True,
    ),
    _Bound(
        "LH205",
        "alpha",
        "alpha / rank beyond {bound}, which caps it",
        lambda p: abs(p.expected / p.strength),
        lambda p: math.copysign(p.strength, p.expected),
        caps=True,
    ),
    _Bound(
        "LH209",
        "rank",
        "a rank {side} {bound} counts as {bound}",
        lambda p: p.rank,
        lambda p: p.scale_of(float(p.rank) if p.alpha is None else p.alpha, 1),
        lambda p: -0.5 if p.root else -1.0,
    ),
)


_SMALL: tuple[tuple[str, str, Callable[[Probe], float]], ...] = (
    ("LH207", "a strength", lambda p: abs(p.strength)),
    ("LH205", "an alpha", lambda p: abs(p.rank if p.alpha is None else p.alpha)),
    ("LH209", "a scale", lambda p: abs(p.expected)),
)


def _switched_off(wrong: Sequence[Probe], right: Sequence[Probe]) -> tuple[str, Trait] | None:
    """Return the code and the trait of a number that counts as 0 where it is small; None where a probe has a scale."""
    if any(abs(p.measured) > 4 * p.tolerance for p in wrong):
        return None
    for code, what, size in _SMALL:
        largest, others = max(map(size, wrong)), {size(p) for p in right}
        if len(others) >= _DIFFERENT and largest < min(others):
            words = f"{what} of {largest:.4g} or less counts as 0 (right from {min(others):.4g} on)"
            return code, Trait(words, "small")
    return None


def bounded(wrong: Sequence[Probe], right: Sequence[Probe]) -> tuple[str, Trait] | None:
    """Return the code and the trait of the first bound that explains all `wrong` probes and that no `right` one denies.

    The right ones have a scale. A bound below which nothing is left comes first.
    """
    if not all(p.expected for p in wrong):
        return None
    found = ((bound.code, trait) for bound in _BOUNDS if (trait := bound.trait(wrong, right)))
    return _switched_off(wrong, right) or next(found, None)


_THRESHOLDS: tuple[tuple[About, str, Callable[[Probe], float]], ...] = (
    ("strength", "a strength", lambda p: p.strength),
    ("strength", "a strength, whatever its sign,", lambda p: abs(p.strength)),
    ("alpha", "alpha / rank", lambda p: 1.0 if p.alpha is None else p.alpha / p.rank),
    ("alpha", "alpha", lambda p: float(p.rank) if p.alpha is None else p.alpha),
    ("rank", "a rank", lambda p: float(p.rank)),
)


def threshold(wrong: Sequence[Probe], right: Sequence[Probe]) -> Trait | None:
    """Return the trait of a number beyond which, or below which, all that has a scale is wrong, and right elsewhere."""
    for about, what, value in _THRESHOLDS:
        if text := beyond(what, {value(p) for p in wrong}, {value(p) for p in right}):
            return Trait(text, about)
    return None


def beyond(what: str, bad: Collection[float], good: Collection[float]) -> str | None:
    """Return beyond which number all that is `bad` lies, and all that is `good` within; None where either are few."""
    if min(len(bad), len(good)) < _DIFFERENT:
        return None
    if min(bad) > max(good):
        return f"{what} of {min(bad):.4g} or more (right up to {max(good):.4g})"
    if max(bad) < min(good):
        return f"{what} of {max(bad):.4g} or less (right from {min(good):.4g} on)"
    return None
