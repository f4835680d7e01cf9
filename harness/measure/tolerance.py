"""How far a right loader may be from the formula: the one place where tolerances are derived.

u is the unit roundoff of the model's dtype; a file in a coarser one is exact as it stands, whoever computes in its
dtype loses digits that the model has: rounding x to it moves x by at most
u*|x|, uniformly, so with variance (u*x)^2 / 3. A right loader may round A and B, the scaled delta twice, and the
sum twice. These errors are independent between elements, so

    noise^2 = u^2/3 * (|W|^2 + |W'|^2 + s^2 * (4 + r) * sum_k |B_k|^2 |A_k|^2)        (Frobenius norm of W' - exact)

where r covers the accumulation of a product of rank r; in what single or double precision leaves unexplained |W'|^2
counts r times, since one may add rank by rank and round each sum. The regression s = <dW, BA>/<BA, BA> over n elements
sees noise / (sqrt(n) * |BA|) of it. What does *not* average out is a rounding of the scale itself (alpha, alpha/rank):
two are allowed in half precision (2u = 0.8 % in bfloat16, below the 1 % that must fail), sixteen in single (1e-6).

Neither does the rounding of the sum when the update is smaller than the step between two weights: W lies on that grid,
so W + s*BA falls back to W and the regression sees less than s. That part, `lost`, is computed (`rounding_loss`), not
bounded: a loader that merges may lose it, one that adds at runtime does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SCALE_ROUNDINGS = {"float64": 16, "float32": 16, "float16": 2, "bfloat16": 2}
_WIDE = ("float64", "float32")  # one may add rank by rank in these, and round the sum as often
_SIGMAS = 6.0
_NOISE_FACTOR = 4.0


@dataclass(frozen=True)
class Tolerance:
    """`scale`: allowed |measured - expected| of the scale; `noise`: allowed Frobenius norm of the unexplained part.

    `lost` is the part of `scale` that is there for updates below the step between two weights.
    """

    scale: float
    noise: float
    dtype: str
    lost: float = 0.0

    def blurred(self, sigma: float) -> Tolerance:
        """Return this tolerance with `sigma`, the standard error of the scale from a residual that was measured."""
        return replace(self, scale=self.scale + _SIGMAS * sigma)

    def why(self) -> str:
        """Say in a few words where the numbers come from."""
        roundings = _SCALE_ROUNDINGS[self.dtype]
        lost = f" + {self.lost:.1e} lost in rounding" if self.lost > 0.1 * self.scale else ""
        return f"{roundings} roundings of the scale in {self.dtype} + {_SIGMAS:.0f} sigma of the regression{lost}"


def scale_rounding(dtype: str) -> float:
    """Return the relative error that rounding the scale itself may make; 8-bit types have it rounded in bfloat16."""
    known = dtype if dtype in _SCALE_ROUNDINGS else "bfloat16"
    return _SCALE_ROUNDINGS[known] * UNIT_ROUNDOFF[known]


def tolerance(
    *,
    dtype: str,
    scale: float,
    elements: int,
    base: float,
    merged: float,
    product: float,
    outer: float,
    rank: int,
    lost: float = 0.0,
) -> Tolerance:
    """Derive the tolerance of one module (or one slice of its rows).

    `base`, `merged`, `product` are the Frobenius norms of W, W' and B@A; `outer` is sqrt(sum_k |B_k|^2 |A_k|^2);
    `scale` the expected factor on B@A; `elements` the number of weights; `lost` what rounding W + scale * B@A takes
    away from the scale.
    """
    u = UNIT_ROUNDOFF[dtype]
    products = scale**2 * (4 + rank) * outer**2
    noise = u * math.sqrt((base**2 + merged**2 + products) / 3)
    regression = noise / (math.sqrt(elements) * product) if product else math.inf
    allowed = _SCALE_ROUNDINGS[dtype] * u * abs(scale) + _SIGMAS * regression + lost
    sums = rank if dtype in _WIDE else 1
    return Tolerance(allowed, _NOISE_FACTOR * u * math.sqrt((base**2 + sums * merged**2 + products) / 3), dtype, lost)
