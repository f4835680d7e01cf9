"""The words scaling laws are made of: what a loader may do with the strength, with an alpha, with a rank.

A law is constant * S(strength) * A(alpha of some module) * R(rank of some module). Each word carries what it costs to
believe in it: the trained convention is free, so the simplest law that explains every probe is the one reported. Words
are functions of one number, so that a committed law can be read without numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean


@dataclass(frozen=True)
class Word:
    """One thing a loader may do with a number; `text` has `{x}` where the number stands."""

    text: str
    apply: Callable[[float], float]
    cost: int
    exponent: float | None = None


def _root(x: float) -> float:
    return math.copysign(math.sqrt(abs(x)), x)


def bfloat16(x: float) -> float:
    """Round to eight significant bits, ties to even."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(fraction * 256), exponent - 8)


STRENGTH = (
    Word("{x}", lambda u: u, 0, 1.0),
    Word("1", lambda u: 1.0, 1, 0.0),
    Word("|{x}|", abs, 1),
    Word("max({x}, 0)", lambda u: max(u, 0.0), 1),
    Word("(1 + {x})", lambda u: 1.0 + u, 2),
    Word("({x} or 1)", lambda u: u or 1.0, 1),
    Word("min({x}, 1)", lambda u: min(u, 1.0), 1),
    Word("clamp({x}, 0, 1)", lambda u: min(max(u, 0.0), 1.0), 1),
    Word("clamp({x}, -1, 1)", lambda u: min(max(u, -1.0), 1.0), 1),
    Word("trunc({x})", lambda u: float(math.trunc(u)), 1),
    Word("bfloat16({x})", bfloat16, 1),
    Word("({x} > 0)", lambda u: float(u > 0), 2),
    Word("({x} != 0)", lambda u: float(u != 0), 2),
    Word("{x}^2", lambda u: u * u, 1, 2.0),
    Word("sign({x})*{x}^2", lambda u: u * abs(u), 2),
    Word("sign({x})*sqrt(|{x}|)", _root, 1, 0.5),
    Word("sqrt(max({x}, 0))", lambda u: math.sqrt(max(u, 0.0)), 2),
)

ALPHA = (
    Word("{x}", lambda a: a, 0, 1.0),
    Word("1", lambda a: 1.0, 1, 0.0),
    Word("trunc({x})", lambda a: float(math.trunc(a)), 1),
    Word("floor({x})", lambda a: float(math.floor(a)), 1),
    Word("round({x})", lambda a: float(round(a)), 1),
    Word("ceil({x})", lambda a: float(math.ceil(a)), 1),
    Word("|{x}|", abs, 1),
    Word("max({x}, 0)", lambda a: max(a, 0.0), 1),
    Word("max({x}, 1)", lambda a: max(a, 1.0), 1),
    Word("min({x}, 1)", lambda a: min(a, 1.0), 1),
    Word("bfloat16({x})", bfloat16, 1),
    Word("{x}^2", lambda a: a * a, 1, 2.0),
    Word("sqrt({x})", _root, 1, 0.5),
    Word("{x}^-1", lambda a: 1.0 / a if a else math.nan, 2, -1.0),
)

RANK = (
    Word("/ {x}", lambda r: 1.0 / r, 0, -1.0),
    Word("1", lambda r: 1.0, 1, 0.0),
    Word("/ sqrt({x})", lambda r: r**-0.5, 1, -0.5),
    Word("* {x}", lambda r: r, 1, 1.0),
    Word("* sqrt({x})", math.sqrt, 1, 0.5),
    Word("/ {x}^2", lambda r: r**-2.0, 1, -2.0),
)

# Where no file carries alpha, training means scale 1: then dividing by the rank is what costs.
NO_ALPHA = Word("1", lambda a: 1.0, 0)
RANK_ALONE = tuple(Word(w.text, w.apply, 0 if w.text == "1" else 1, w.exponent) for w in RANK)


def word_of(words: Sequence[Word], power: float) -> Word:
    """Return the word of `words` that is this power of its number, or a word for a power that has none there."""
    named = next((word for word in words if word.exponent == power), None)
    return named or Word(f"{{x}}^{power:g}", lambda x: _power(x, power), 2, power)


def _power(base: float, power: float) -> float:
    """Return base ** power in the real numbers: NaN where there is none, infinite for a pole."""
    if base < 0 and power != int(power):
        return math.nan
    return math.inf if base == 0 and power < 0 else float(base**power)


def _most_common(values: Sequence[float]) -> float:
    return max(dict.fromkeys(values), key=list(values).count)


SOURCES: dict[str, Callable[[Sequence[float]], float]] = {
    "first": lambda v: v[0],
    "last": lambda v: v[-1],
    "most common": _most_common,
    "max": max,
    "min": min,
    "mean": mean,
}
"""Which of a file's alphas, or ranks, a loader may take for all modules."""
