"""DoRA: the scale stands inside a norm, and a magnitude in front of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harness.doctor.verify.layer import BLOCKS, UNIT_ROUNDOFF, MergedLayer, Runs, Sample, index_of
from harness.doctor.verify.products import sums_by_chunk
from harness.doctor.verify.rows import Rounding, RowSums
from harness.doctor.verify.vote import Array, Flags, half_step

_ROWS_TO_FIT = 8  # rows of each block: a factor of each column is fitted to 96 elements
_WHOLE_UP_TO = 1 << 22  # elements of a weight that is read whole to compare norms along its columns
_FACTOR_ROUNDINGS = 4  # of the norm, the magnitude, the quotient and the product
_COARSEST = 2.0**-3  # unit roundoff of float8
_LEAST_OFF = 1e-3
_TWO_ROUNDINGS = 1.6  # half steps
_MOST = 0.9  # share of the elements that a blend must explain


@dataclass(frozen=True)
class WholeRows:
    """Whole rows of W, of W' and of the product: [n, columns]; and their magnitudes, or those of the columns."""

    before: Tensor
    after: Tensor
    product: Tensor
    magnitude: Tensor


@dataclass(frozen=True)
class DoraLayer(MergedLayer):
    """W' = m * (W + s P) / |W + s P|, normalised for each row (`axis` 0) or each column (1).

    Row by row W' = c W + c s P: c is fitted, and what is sampled is W' / c - W, which is s P and its rounding. Rounding
    biases the s that c is fitted with, by least squares; of its error only |s P|^2 / |W|^2 reaches c. Whether c is
    m / |W + s P| is another question (`fault`).
    """

    magnitude: Tensor
    axis: int

    def sample(self, elements: int) -> Sample:
        """Return a sample with the factor of each row, or column, taken out."""
        raw = super().sample(elements)
        seen: Flags = np.asarray(raw.changed.any(axis=1))
        if not seen.any():
            return raw
        return _unscaled(raw, seen, _first_scale(raw, seen, self.axis), self.axis)

    @property
    def streams(self) -> bool:
        """False where a factor belongs to a column, which no chunk of rows can tell."""
        return self.axis == 0

    def stream(self, rounding: Rounding, device: str = "cpu") -> RowSums:
        """Read every row once, on the processor whatever the `device`, with its factor taken out."""
        return sums_by_chunk(self.product, *self._stored(), rounding, self._factors)

    def _factors(self, before: Array, after: Array, product: Array) -> Array:
        factor, _, _ = _free_factors(before, after, product, 0)
        found: Array = np.where(np.isfinite(factor) & (factor != 0), factor, 1)[:, None]
        return found

    def fault(self, scale: float) -> str | None:
        """Say how the factor differs from m / |W + scale * P|; None when it does not, or cannot be compared."""
        rows = self._whole_rows()
        if rows is None:
            return None
        new = rows.before + scale * rows.product
        along = 1 - self.axis
        used = (rows.after * new).sum(along) / new.square().sum(along)
        wanted = rows.magnitude / torch.linalg.vector_norm(new, dim=along)
        stored = UNIT_ROUNDOFF.get(self.dtype, _COARSEST) / np.sqrt(new.shape[along])
        allowed = max(_LEAST_OFF, _FACTOR_ROUNDINGS * (self.roundoff + stored))
        if float((used / wanted - 1).abs().median()) <= allowed:
            return None
        plain = float((used - 1).abs().median()) <= allowed
        how = f"the factor is {float((used / wanted).median()):.3g}x" if not plain else "the sum was stored as it is"
        return f"the magnitude was not applied as m / |W + scale * B @ A|: {how}"

    def blends(self, scale: float, strength: float) -> bool:
        """Tell whether W' is W + strength * (DoRA at `scale` - W): the strength outside the norm, as ComfyUI has it."""
        rows = self._whole_rows()
        if rows is None:
            return False
        new = rows.before + scale * rows.product
        norm = torch.linalg.vector_norm(new, dim=1 - self.axis, keepdim=True)
        full = rows.magnitude.reshape(norm.shape) * new / norm
        wanted = rows.before + strength * (full - rows.before)
        half = torch.from_numpy(half_step(wanted.numpy(), self.dtype))
        slack = _FACTOR_ROUNDINGS * self.roundoff * (strength * (full - rows.before)).abs()
        near = (rows.after - wanted).abs() <= _TWO_ROUNDINGS * half + slack
        return bool(near.double().mean() >= _MOST)

    def _whole_rows(self) -> WholeRows | None:
        """Return whole rows from the middle of each block that changed, everything for norms along columns."""
        if self.axis and self.rows * self.columns > _WHOLE_UP_TO:
            return None
        blocks = min(BLOCKS, self.rows)
        runs = [(0, self.rows)] if self.axis else self._runs(blocks, 1)
        before, after = (torch.cat([rows(*run) for run in runs]).double() for rows in self._stored())
        product = self.product.part(index_of(runs), slice(None), torch.float64)
        magnitude = self.magnitude.reshape(-1).double()
        if self.axis:
            return WholeRows(before, after, product, magnitude)
        kept = (before != after).any(dim=1)
        picked = magnitude[index_of(runs)]
        return WholeRows(before[kept], after[kept], product[kept], picked[kept]) if kept.any() else None

    def _grid(self, elements: int) -> tuple[Runs, slice]:
        """Take more rows of fewer columns where each column has its own factor."""
        if self.axis == 0:
            return super()._grid(elements)
        blocks = min(BLOCKS, self.rows)
        count = min(max(_ROWS_TO_FIT, elements // (blocks * self.columns)), -(-self.rows // blocks))
        step = max(1, blocks * count * self.columns // elements)
        return self._runs(blocks, count), slice(0, None, step)


def _first_scale(sample: Sample, seen: Flags, axis: int) -> float:
    """Return the scale by least squares over the rows `seen`, each row (column) weighted by what it tells."""
    before, change, product = sample.base[seen], sample.change[seen], sample.product[seen]
    c, cs, weight = _free_factors(before, before + change, product, axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.nansum(weight * c * cs) / np.nansum(weight * c * c)
    return float(found) if np.isfinite(found) else 0.0


def _free_factors(before: Array, after: Array, p: Array, axis: int) -> tuple[Array, Array, Array]:
    """Fit W' = c W + cs P for each row (column); return c, cs and a weight, NaN where W and P are parallel."""
    pairs = (before, before), (before, p), (p, p), (before, after), (p, after)
    ww, wp, pp, wa, pa = (np.multiply(x, y, dtype=np.float64).sum(1 - axis) for x, y in pairs)
    determinant = ww * pp - wp**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (wa * pp - pa * wp) / determinant, (pa * ww - wa * wp) / determinant, determinant / ww


def _unscaled(sample: Sample, seen: Flags, scale: float, axis: int) -> Sample:
    """Return the sample of W' / c - W with the factors c that fit W' = c (W + scale * P) best; 1 in unchanged rows."""
    after, new = sample.base + sample.change, sample.base + sample.product * sample.base.dtype.type(scale)
    over = np.square(new[seen], dtype=np.float64).sum(1 - axis, keepdims=True)
    fitted = np.multiply(after[seen], new[seen], dtype=np.float64).sum(1 - axis, keepdims=True)
    c = np.ones((len(seen), new.shape[1]), new.dtype)
    c[seen] = np.where((fitted != 0) & (over != 0), fitted / np.where(over == 0, 1, over), 1)
    return replace(sample, change=after / c - sample.base, half=sample.half / np.abs(c))
