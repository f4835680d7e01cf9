"""A layer whose weight is codes: what a merge into them may be off by, and the scale that it was made with.

A merge rounds W + s * B @ A to the layer's codes, which takes something from s, by every element in its own way. So the
same is done to the exact weight: what was measured is held against references merged into the same codes, at the scale
expected and about the one measured, and the nearest says what the codes took away. How far the measured
weight is from it tells how well the quantiser is known: one that differs, in its blocks or its roundings, blurs the
scale by that much. Who adds beside the codes leaves them as they are, and is held to what its dtype rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.benches.codes import rounded_to
from harness.benches.layer import Layer
from harness.measure.compare import Fit, norm

_NOISE = 2.0  # times what rounding the right sum does: kinds of one family differ in details
_SCALES = 2.0**-8  # of a weight: quantisers keep the codes' own scales in half precision, or eight bits
_FLIPS = 4  # elements whose sum lies so near to the middle of a step that they may fall to either side
_UNIFORM = 12  # times the mean square of a rounding is the square of its step
_BOTH = math.sqrt(2)  # roundings, of W and of the sum, which are independent
_COARSEST = 0.5  # of a weight: two bits take a third
_RESTORED = 0.2  # of the scale: what the codes take beyond that cannot be made up for


@dataclass(frozen=True)
class CodesReference:
    """The layer as an exact sum of `scale`, rounded to codes, makes it.

    `fit` is what is measured of that, `size` its weight's; `rest` what the rounding took and `apart` what the loaded
    layer is off by it (Frobenius norms); `slope` the size of what a unit of scale adds, `elements` how many there are.
    """

    scale: float
    fit: Fit
    size: float
    rest: float
    apart: float
    slope: float
    elements: int

    @property
    def lost(self) -> float:
        """What rounding to the codes takes from the scale."""
        return self.scale - self.fit.scale

    @property
    def sigma(self) -> float:
        """The standard error of the scale that is read by this reference."""
        flips = self.rest**2 * _FLIPS * _UNIFORM / self.elements
        return math.sqrt(self.apart**2 + flips) / (math.sqrt(self.elements) * self.slope) if self.slope else math.inf


def through_codes(seen: Fit, references: Sequence[CodesReference]) -> Fit:
    """Return the fit of a quantised layer: the scale before the codes took from it, within what they blur.

    The first of `references` is at the scale expected.
    """
    if seen.direction_right and not seen.unchanged:
        return seen
    near = min(references, key=lambda reference: reference.apart)
    rounding = max(math.hypot(_NOISE * each.fit.residual, _SCALES * each.size) for each in references)
    noise = math.hypot(seen.tolerance.noise, rounding)
    lost = max(abs(reference.lost) for reference in references)
    return replace(
        seen,
        scale=seen.scale + near.lost,
        tolerance=replace(seen.tolerance, noise=noise).blurred(near.sigma),
        lost=lost if lost > _RESTORED * abs(seen.scale or seen.expected) else 0.0,
        still=seen.tolerance.noise,  # who changed no code, and added nothing beside them, did nothing
    )


def through_own_codes(seen: Fit, plain: Tensor, taken: Tensor) -> Fit:
    """Return the fit of a layer that the loader itself rounds to codes, of which nothing more is known.

    `taken` is what that rounding took from W, `plain`: the sum is rounded as well, unless the LoRA is added beside the
    codes, which is held to what its dtype rounds. Codes that are the means of what they stand for, as nf4's nearly are,
    shrink what they round by the square of what they take.
    """
    size, share = norm(taken), norm(taken) / norm(plain) if norm(plain) else 0.0
    if (seen.direction_right and not seen.unchanged) or not 0 < share < _COARSEST:
        return seen
    shrunk = _NOISE * share**2 * max(abs(seen.scale), abs(seen.expected))
    noise = math.hypot(seen.tolerance.noise, _NOISE * _BOTH * size)
    allowed = replace(seen.tolerance, noise=noise, scale=seen.tolerance.scale + shrunk)
    if seen.product and seen.residual >= seen.product * abs(seen.scale):  # below it the fit has counted it
        allowed = allowed.blurred(_BOTH * size / (math.sqrt(taken.numel()) * seen.product))
    return replace(seen, tolerance=allowed, still=seen.tolerance.noise)


def rounded(layer: Layer, weight: Tensor) -> Tensor:
    """Return a weight `[rows, columns]` as the codes of `layer` hold it; a column for the bias stays as it is."""
    codes, bias = weight[:, : layer.columns], weight[:, layer.columns :]
    return torch.cat([rounded_to(layer.codes, codes.double()), bias.double()], dim=1)
