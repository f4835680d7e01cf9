"""The words scaling laws are made of: what a loader may do with the strength, with an alpha, with a rank.

A law is constant * S(strength) * A(alpha of some module) * R(rank of some module). Each word carries what it costs to
believe in it: the trained convention is free, so the simplest law that explains every probe is the one reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Word:
    """One thing a loader may do with a number; `text` has `{x}` where the number stands."""

    text: str
    apply: Callable[[Vector], Vector]
    cost: int
    exponent: float | None = None


def _safe_root(x: Vector) -> Vector:
    return np.sign(x) * np.sqrt(np.abs(x))


def _bfloat16(x: Vector) -> Vector:
    """Round to eight significant bits, ties to even."""
    fraction, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.round(fraction * 256), exponent - 8))


STRENGTH = (
    Word("{x}", lambda u: u, 0, 1.0),
    Word("1", np.ones_like, 1, 0.0),
    Word("|{x}|", np.abs, 1),
    Word("max({x}, 0)", lambda u: np.maximum(u, 0.0), 1),
    Word("(1 + {x})", lambda u: 1.0 + u, 2),
    Word("({x} or 1)", lambda u: np.where(u == 0, 1.0, u), 1),
    Word("min({x}, 1)", lambda u: np.minimum(u, 1.0), 1),
    Word("clamp({x}, 0, 1)", lambda u: np.clip(u, 0.0, 1.0), 1),
    Word("clamp({x}, -1, 1)", lambda u: np.clip(u, -1.0, 1.0), 1),
    Word("trunc({x})", np.trunc, 1),
    Word("bfloat16({x})", _bfloat16, 1),
    Word("({x} > 0)", lambda u: (u > 0).astype(float), 2),
    Word("({x} != 0)", lambda u: (u != 0).astype(float), 2),
    Word("{x}^2", np.square, 1, 2.0),
    Word("sign({x})*{x}^2", lambda u: u * np.abs(u), 2),
    Word("sign({x})*sqrt(|{x}|)", _safe_root, 1, 0.5),
    Word("sqrt(max({x}, 0))", lambda u: np.sqrt(np.maximum(u, 0.0)), 2),
)

ALPHA = (
    Word("{x}", lambda a: a, 0, 1.0),
    Word("1", np.ones_like, 1, 0.0),
    Word("trunc({x})", np.trunc, 1),
    Word("floor({x})", np.floor, 1),
    Word("round({x})", np.round, 1),
    Word("ceil({x})", np.ceil, 1),
    Word("|{x}|", np.abs, 1),
    Word("max({x}, 0)", lambda a: np.maximum(a, 0.0), 1),
    Word("max({x}, 1)", lambda a: np.maximum(a, 1.0), 1),
    Word("min({x}, 1)", lambda a: np.minimum(a, 1.0), 1),
    Word("bfloat16({x})", _bfloat16, 1),
    Word("{x}^2", np.square, 1, 2.0),
    Word("sqrt({x})", _safe_root, 1, 0.5),
    Word("{x}^-1", lambda a: 1.0 / np.where(a == 0, np.nan, a), 2, -1.0),
)

RANK = (
    Word("/ {x}", lambda r: 1.0 / r, 0, -1.0),
    Word("1", np.ones_like, 1, 0.0),
    Word("/ sqrt({x})", lambda r: r**-0.5, 1, -0.5),
    Word("* {x}", lambda r: r, 1, 1.0),
    Word("* sqrt({x})", np.sqrt, 1, 0.5),
    Word("/ {x}^2", lambda r: r**-2.0, 1, -2.0),
)

# Where no file carries alpha, training means scale 1: then dividing by the rank is what costs.
NO_ALPHA = Word("1", np.ones_like, 0)
RANK_ALONE = tuple(Word(w.text, w.apply, 0 if w.text == "1" else 1, w.exponent) for w in RANK)


def _most_common(values: Sequence[float]) -> float:
    return max(dict.fromkeys(values), key=list(values).count)


SOURCES: tuple[tuple[str, Callable[[Sequence[float]], float]], ...] = (
    ("first", lambda v: v[0]),
    ("last", lambda v: v[-1]),
    ("most common", _most_common),
    ("max", max),
    ("min", min),
    ("mean", mean),
)
