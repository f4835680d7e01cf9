"""Roundings: probes that all behave as if one number had gone through a dtype on its way to the scale."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.law.grammar import bfloat16
from harness.law.law import Law
from harness.law.probe import Probe
from harness.law.traits import About, Trait

_ENOUGH = 3  # wrong probes of different inputs
_SLACK = 1.5
_CHANCE = 0.01  # that values which are off by something else are off as their rounding would have them


@dataclass(frozen=True)
class _Number:
    """A number that the scale is a multiple of; `value` is None for a probe that does not have it."""

    name: str
    code: str
    about: About
    value: Callable[[Probe], float | None]

    def scale(self, probe: Probe, rounded: Callable[[float], float]) -> float:
        """Return the scale of a loader that rounds this number."""
        value = self.value(probe)
        return rounded(value) * (probe.expected / value) if value else probe.expected


_NUMBERS = (
    _Number("the strength", "LH207", "strength", lambda p: p.strength),
    _Number("alpha", "LH205", "alpha", lambda p: p.alpha),
    _Number("alpha / rank", "LH209", "part", lambda p: p.expected / p.strength if p.strength and p.alpha else None),
    _Number("strength * alpha / rank", "LH209", "part", lambda p: p.expected),
)


def float16(x: float) -> float:
    """Round to float16; what is too large becomes infinite."""
    try:
        return float(struct.unpack("<e", struct.pack("<e", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


_BY_DTYPE: Mapping[str, Callable[[float], float]] = {"bfloat16": bfloat16, "float16": float16}


def _exact(x: float) -> float:
    return x


_DTYPES: Mapping[str, Callable[[Probe], Callable[[float], float]]] = {
    "bfloat16": lambda p: bfloat16,
    "float16": lambda p: float16,
    "the file's dtype": lambda p: _BY_DTYPE.get(p.file_dtype, _exact),
    "the model's dtype": lambda p: _BY_DTYPE.get(p.dtype, _exact),
}


def rounds(wrong: Sequence[Probe], every: Sequence[Probe]) -> tuple[str, Trait] | None:
    """Return the code and the trait of the rounding that explains all probes, among them the `wrong` ones.

    Where several do, the trait names each of them.
    """
    found = [(number, dtype) for number in _NUMBERS for dtype in _DTYPES if _explains(number, dtype, wrong, every)]
    if not found:
        return None
    numbers = list(dict.fromkeys(number for number, _ in found))
    code, about = (numbers[0].code, numbers[0].about) if len(numbers) == 1 else ("LH209", "part")
    text = " or ".join(f"{dtype} rounds {number.name}" for number, dtype in found)
    return code, Trait(text, about)


def _explains(number: _Number, dtype: str, wrong: Sequence[Probe], every: Sequence[Probe]) -> bool:
    if len({(p.strength, p.alpha, p.rank) for p in wrong}) < _ENOUGH or _chance(number, wrong) > _CHANCE:
        return False
    return all(abs(p.measured - number.scale(p, _DTYPES[dtype](p))) <= _SLACK * p.tolerance for p in (*wrong, *every))


def _chance(number: _Number, wrong: Sequence[Probe]) -> float:
    """Return how often every value would be off by that much, within what is allowed, by chance."""
    off: dict[float | None, float] = {}
    for p in wrong:
        value = number.value(p)
        off[value] = min(off.get(value, 1.0), _SLACK * p.tolerance / abs(p.measured - p.expected))
    return math.prod(off.values())


def rounding_of(law: Law) -> Trait | None:
    """Return the rounding that a word of a law stands for."""
    words = {"strength": law.strength, "alpha": law.alpha}
    rounded = (n for n in _NUMBERS if n.about in words and words[n.about].apply is bfloat16)
    return next((Trait(f"bfloat16 rounds {number.name}", number.about) for number in rounded), None)
