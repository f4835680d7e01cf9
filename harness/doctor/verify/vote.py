"""The scale that a merge used, read through its rounding: every element bounds it, the most agreed value is it.

A merged element w' is w + s * p rounded, so s lies in [(w' - h - w) / p, (w' + h - w) / p] with h half a step of the
merged dtype at w'. The plain projection <w' - w, p> / <p, p> is biased low wherever updates are smaller than h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.doctor.quantised import TABLES

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]

# dtype -> explicit mantissa bits, exponent of the smallest normal number; float64 as if it had 40 bits, because
# nothing merges exactly enough to be tested against its own steps
_STEPS = {
    "float64": (40, -1022), "float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14),
    "float8_e4m3fn": (3, -6), "float8_e5m2": (2, -14),
}  # fmt: skip
_WHOLE = "int8"  # whole numbers of steps of a quantised weight
DTYPES = frozenset({*_STEPS, _WHOLE, *TABLES})
_STEP_ROUNDED = 2.0**-11  # relative: the step is stored in 16 bits, codes were made before that
_TABLE_ROUNDED = 2.0**-6  # the same where the step is stored in 8 bits, and what was merged before in bfloat16
_SURE = 3.0  # standard deviations of a count of elements that disagree


@dataclass(frozen=True)
class Vote:
    """The value most intervals cover, the range in which as many do up to chance, and the share that does."""

    scale: float
    low: float
    high: float
    coverage: float

    @property
    def width(self) -> float:
        """How far the range reaches."""
        return self.high - self.low


def work_dtype(dtype: str) -> type[np.floating[Any]]:
    """Return the numpy type in which intervals of `dtype` are exact enough."""
    return np.float64 if dtype in ("float64", "float32") else np.float32


def stored_as(values: Tensor, dtype: str) -> Tensor:
    """Return values as `dtype` keeps them: of whole numbers, and of a table, the nearest."""
    import torch

    if dtype in TABLES:
        levels = torch.tensor(TABLES[dtype], dtype=torch.float64)
        between = (levels[1:] + levels[:-1]) / 2
        return levels[torch.bucketize(values.double(), between)].to(values.dtype)
    return values.round() if dtype == _WHOLE else values.to(getattr(torch, dtype))


def half_step(values: NDArray[Any], dtype: str) -> Array:
    """Return half the distance from each value to its neighbours in `dtype`.

    Exact but below a power of two, where the neighbour is nearer: the interval is then too wide on one side, never
    too narrow.
    """
    if dtype in TABLES:
        return _half_gap(values, np.asarray(TABLES[dtype])).astype(values.dtype)
    if dtype == _WHOLE:
        whole: Array = np.abs(values) * values.dtype.type(_STEP_ROUNDED) + values.dtype.type(0.5)
        return whole
    bits, smallest = _STEPS[dtype]
    if values.dtype == np.float64:
        powers = (values.view(np.uint64) & np.uint64(0x7FF0 << 48)).view(np.float64)
    else:
        powers = (values.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    floor = values.dtype.type(2.0) ** max(smallest, -1021 if values.dtype == np.float64 else -125)
    steps: Array = np.maximum(powers, floor) * values.dtype.type(2.0 ** -(bits + 1))
    return steps


def _half_gap(values: NDArray[Any], levels: Array) -> Array:
    """Return half the distance of each value to the farther of the two levels of a table that are next to it."""
    gaps = np.diff(levels) / 2
    sides = np.maximum(np.append(gaps, gaps[-1]), np.append(gaps[0], gaps))
    own = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    found: Array = sides[own] + np.abs(values) * _TABLE_ROUNDED
    return found


def bounds(change: Array, product: Array, half: Array) -> tuple[Array, Array]:
    """Return the lowest and highest scale that each element allows; elements whose product is 0 say nothing."""
    told = product != 0
    share = np.reciprocal(product[told])
    centre = change[told] * share
    reach = half[told] * np.abs(share)
    return centre - reach, centre + reach


def vote(low: Array, high: Array, *, always: int = 0) -> Vote:
    """Return the value covered by most intervals [low, high]: one sweep over the sorted end points. Sorts in place.

    `always` counts intervals that were left out because they cover every value in question.
    """
    total = len(low) + always
    if not len(low):
        return Vote(0.0, -np.inf, np.inf, 1.0)
    low.sort()
    high.sort()
    closed = np.searchsorted(high, low, side="left")
    open_now = np.arange(1 + always, len(low) + 1 + always) - closed
    best = int(open_now.argmax())
    most = int(open_now[best])
    least = most - int(_SURE * np.sqrt(total - most))
    left, right = _reach(open_now, best, least)
    last = int(closed[right] + open_now[right] - least)  # so many intervals may end before the count is too low
    begin, end = float(low[left]), float(high[min(last, len(high) - 1)])
    return Vote((begin + end) / 2, begin, end, most / total)


def _reach(counts: NDArray[np.int_], best: int, least: int) -> tuple[int, int]:
    """Return the first and last place around `best` between which no count falls below `least`."""
    below = np.flatnonzero(counts < least)
    at = int(np.searchsorted(below, best))
    left = int(below[at - 1]) + 1 if at else 0
    return left, (int(below[at]) - 1 if at < len(below) else len(counts) - 1)


def vote_within(low: Array, high: Array, window: tuple[float, float]) -> Vote:
    """Return the vote among the values inside `window`; only the intervals that end in it need sorting."""
    begin, end = window
    touching = (high >= begin) & (low <= end)
    whole = (low <= begin) & (high >= end)
    partly = touching & ~whole
    found = vote(low[partly], high[partly], always=int(whole.sum()))
    kept = int(touching.sum())
    return Vote(found.scale, max(found.low, begin), min(found.high, end), found.coverage * kept / len(low))
