"""Compare what a module computes after loading with W + scale * B @ A: the measured scale, and what it leaves over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.measure.tolerance import UNIT_ROUNDOFF, Tolerance, tolerance

_FAINT = 0.05
_ALONG = 0.9


@dataclass(frozen=True)
class Fit:
    """The regression of one module's change on B@A: change = scale * B@A + residual.

    `residual` is |change - scale * B@A| (Frobenius), `change` is |W' - W|, `product` is |B@A|; `lost` is what rounding
    takes away from the expected scale or the measured one, whichever loses more. `along_base` is the factor on W that
    explains the residual, 0 where none explains most of it. A change up to `still` is none, by default all that is
    within the tolerance.
    """

    scale: float
    residual: float
    change: float
    product: float
    tolerance: Tolerance
    expected: float
    lost: float = 0.0
    along_base: float = 0.0
    still: float | None = None

    @property
    def finite(self) -> bool:
        """True when neither the scale nor the residual is NaN or infinite."""
        return math.isfinite(self.scale) and math.isfinite(self.residual)

    @property
    def scale_right(self) -> bool:
        """True when the measured scale is the expected one within the tolerance."""
        return abs(self.scale - self.expected) <= self.tolerance.scale

    @property
    def direction_right(self) -> bool:
        """True when nothing but rounding is left over."""
        return self.residual <= self.tolerance.noise

    @property
    def blurred(self) -> bool:
        """True when more is left unexplained than the scale is off by: the direction or the digits are at fault."""
        return not self.direction_right and abs(self.scale - self.expected) * self.product <= self.residual

    @property
    def faint(self) -> bool:
        """True when much of the update is below the step between two weights: the scale says little of the law."""
        return self.lost > _FAINT * abs(self.scale or self.expected)

    @property
    def unchanged(self) -> bool:
        """True when the module computes what it did before loading."""
        return self.change <= (self.tolerance.noise if self.still is None else self.still)

    def restored(self, times: int) -> bool:
        """Tell whether no more than rounding is between the module and what it was, after so many loads and unloads.

        Each of them rounds a layer of codes anew.
        """
        anew = 1.0 if self.still is None else math.sqrt(times)
        return self.change <= anew * self.tolerance.noise

    @property
    def relative_residual(self) -> float:
        """The residual as a share of the change (0: direction right, 1: unrelated to B@A)."""
        return self.residual / self.change if self.change else 0.0


@dataclass(frozen=True)
class Direction:
    """What a LoRA adds to one layer per unit of scale: `product: [rows, columns]` in float64.

    `outer: [rows, columns]` is, element by element, the root of the summed squares of the terms that the product adds
    up: sqrt(sum_k B_ok^2 A_ki^2). `rank` is the number of those terms.
    """

    product: Tensor
    outer: Tensor
    rank: int

    def rows(self, rows: slice) -> Direction:
        """Return the part of some rows."""
        return Direction(self.product[rows], self.outer[rows], self.rank)


def low_rank(a: Tensor, b: Tensor) -> Direction:
    """Return the direction B @ A of `a: [rank, columns]` and `b: [rows, rank]`."""
    a, b = a.double(), b.double()
    return Direction(b @ a, (b.square() @ a.square()).sqrt(), a.shape[0])


def fit(before: Tensor, after: Tensor, direction: Direction, *, expected: float, dtype: str) -> Fit:
    """Fit one module; `before` and `after: [rows, columns]`, computed in float64."""
    change = after.double() - before.double()
    product = direction.product
    energy = float((product * product).sum())
    scale = float((change * product).sum()) / energy if energy else 0.0
    largest = max(abs(scale), abs(expected))  # a wrong scale rounds like one of its own size
    lost = rounding_loss(before, product, expected, dtype)
    allowed = tolerance(
        dtype=dtype,
        scale=largest,
        elements=change.numel(),
        base=norm(before),
        merged=norm(after),
        product=math.sqrt(energy),
        outer=norm(direction.outer),
        rank=direction.rank,
        lost=lost,
    )
    rest = change - scale * product
    residual = norm(rest)
    if residual > allowed.noise and residual < math.sqrt(energy) * abs(scale):
        # noise of the loader's own blurs the regression; it is reported as noise, not as a wrong scale too
        allowed = allowed.blurred(residual / (math.sqrt(change.numel()) * math.sqrt(energy)))
    lost = max(lost, rounding_loss(before, product, scale, dtype))
    along = _along(rest, before.double()) if residual > allowed.noise else 0.0
    return Fit(scale, residual, norm(change), math.sqrt(energy), allowed, expected, lost, along)


def _along(rest: Tensor, base: Tensor) -> float:
    """Return the factor on `base` that explains `rest`, 0 unless it explains most of it."""
    near = alignment(rest, base)
    return near * norm(rest) / norm(base) if abs(near) > _ALONG else 0.0


def rounding_loss(before: Tensor, product: Tensor, scale: float, dtype: str) -> float:
    """Return how much of `scale` the regression cannot see once W + scale * B@A is rounded to `dtype`.

    |<round(W + s*P) - (W + s*P), P>| / <P, P>, for `before` W and `product` P `[rows, columns]` in float64; 0 in single
    precision, where it is far below the tolerance.
    """
    energy = float((product * product).sum())
    if not energy or UNIT_ROUNDOFF[dtype] <= UNIT_ROUNDOFF["float32"]:
        return 0.0
    exact = before.double() + scale * product
    rounded = exact.to(getattr(torch, dtype)).double()
    return abs(float(((rounded - exact) * product).sum())) / energy


def fit_slices(
    before: Tensor, after: Tensor, direction: Direction, slices: Sequence[slice], *, expected: float, dtype: str
) -> tuple[Fit, ...]:
    """Fit each row range on its own; a fault in one projection of a fused layer shows in its slice only."""
    return tuple(fit(before[r], after[r], direction.rows(r), expected=expected, dtype=dtype) for r in slices)


def norm(x: Tensor) -> float:
    """Frobenius norm accumulated in float64 (float32 `x.norm()` is off by up to 0.4 % on large layers)."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def alignment(change: Tensor, candidate: Tensor) -> float:
    """Cosine between a change and a candidate delta of the same shape, in [-1, 1]; 0 when either vanishes."""
    size = norm(change) * norm(candidate)
    return float((change.double() * candidate.double()).sum()) / size if size else 0.0
