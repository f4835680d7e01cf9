"""One layer before and after the merge, beside the product B @ A that a LoRA adds to it; DoRA with its magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from harness.doctor.verify.products import Product, sums_by_chunk, window
from harness.doctor.verify.row_products import Rows
from harness.doctor.verify.rows import Rounding, RowSums, Window
from harness.doctor.verify.vote import Array, Flags, half_step, stored_as, work_dtype
from harness.doctor.verify.weights import Weights

BLOCKS = 12  # a multiple of 2, 3, 4 and 6: q/k/v, k/v and gate/up lie in blocks of their own
_LOOKED_AT = 16_000  # elements
_MOST_ROWS = 0.9  # share of the rows that must be values of a coarser dtype: some may be damaged
_ROWS_TO_FIT = 8  # rows of each block: a factor of each column is fitted to 96 elements
_WHOLE_UP_TO = 1 << 22  # elements of a weight that is read whole to compare norms along its columns
_FACTOR_ROUNDINGS = 4  # of the norm, the magnitude, the quotient and the product
_COARSEST = 2.0**-3  # unit roundoff of float8
_LEAST_OFF = 1e-3
_LEAST_DRIFT, _STEP_DRIFT = 5e-4, 5e-3
TWO_ROUNDINGS = 1.6  # half steps: the sum of two roundings stays below it in 96 of 100 elements
_MARGIN = 1.1  # of several roundings over two
_MOST = 0.9  # share of the elements that a blend must explain
Runs = list[tuple[int, int]]
UNIT_ROUNDOFF = {"float64": 2.0**-40, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Sample:
    """Rows of one layer as arrays [rows, columns]; of a layer of `rows`.

    `block` gives each row's block, `index` its number, `finite` says that everything read of it is, also in the columns
    left out; `roundoff` is that of the delta; `blur` is how much further rounding may leave an element off where it
    was rounded after each of several merges.
    """

    base: Array
    change: Array
    product: Array
    half: Array
    changed: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    block: np.ndarray[tuple[int], np.dtype[np.int_]]
    index: np.ndarray[tuple[int], np.dtype[np.int_]]
    finite: np.ndarray[tuple[int], np.dtype[np.bool_]]
    dtype: str
    roundoff: float
    rows: int
    blur: float = 1.0

    def of(self, rows: Flags) -> Sample:
        """Return the sample of the flagged rows alone."""
        names = ("base", "change", "product", "half", "changed", "block", "index", "finite")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def rounded(self, values: Array) -> Array:
        """Return `values` rounded to the dtype of the merge."""
        stored = stored_as(torch.from_numpy(values), self.dtype)
        return stored.to(torch.from_numpy(values[:0]).dtype).numpy()


@dataclass(frozen=True)
class MergedLayer:
    """W: [out, in] of `base` and of `merged`, and the product that a LoRA would add to it, or `merges` of them."""

    tensor: str
    base: Weights
    merged: Weights
    product: Product
    lora_dtype: str
    merges: int = field(default=1, kw_only=True)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.product.shape[0]

    @property
    def columns(self) -> int:
        """The number of columns."""
        return self.product.shape[1]

    @cached_property
    def dtype(self) -> str:
        """The dtype the merge was made in: that it is stored in, or a coarser one that holds what is stored."""
        stored = self.merged.dtype(self.tensor)
        if stored not in ("float64", "float32", "float16"):
            return stored
        rows = torch.cat([self.merged.rows(self.tensor, *run) for run in self._runs(min(BLOCKS, self.rows), 1)])
        fits = {
            name: float((rows.to(getattr(torch, name)).to(rows.dtype) == rows).all(dim=1).float().mean())
            for name in ("bfloat16", "float16")
        }
        return next((name for name, share in fits.items() if share >= _MOST_ROWS and bool(rows.any())), stored)

    @property
    def streams(self) -> bool:
        """True when all rows can be measured in one pass."""
        return True

    def sample(self, elements: int) -> Sample:
        """Return about `elements` elements: the same columns of at least one row from every block of rows."""
        runs, columns = self.grid(elements)
        read = [torch.cat([rows(*run) for run in runs]) for rows in self._stored()]
        finite = torch.stack([_finite(part) for part in read]).all(dim=0).numpy()
        base, merged = (part[:, columns] for part in read)
        work = self._work
        before, after = base.to(work), merged.to(work)
        return Sample(
            base=before.numpy(),
            change=(after - before).numpy(),
            product=self.sampled(self.product, elements),
            half=half_step(after.numpy(), self.dtype),
            changed=(stored_as(base, self.dtype).to(work) != after).numpy(),
            block=np.repeat(np.arange(len(runs)), [stop - start for start, stop in runs]),
            index=index_of(runs).numpy(),
            finite=finite,
            dtype=self.dtype,
            roundoff=self.roundoff,
            rows=self.rows,
            blur=max(1.0, _MARGIN * math.sqrt(self.merges / 2)),  # the sum of n roundings spreads as sqrt(n)
        )

    def sampled(self, product: Product, elements: int) -> Array:
        """Return what `sample` reads of another product of this shape."""
        runs, columns = self.grid(elements)
        found: Array = product.part(index_of(runs), columns, self._work).numpy()
        return found

    @property
    def _work(self) -> torch.dtype:
        return torch.float64 if work_dtype(self.dtype) is np.float64 else torch.float32

    def grid(self, elements: int) -> tuple[Runs, slice]:
        """Return the rows to read, a run in each block, and the columns."""
        blocks = min(BLOCKS, self.rows)
        columns = slice(0, None, max(1, blocks * self.columns // elements))
        count = max(1, -(-elements // (blocks * len(range(self.columns)[columns]))))
        return self._runs(blocks, count), columns

    def _runs(self, blocks: int, count: int) -> Runs:
        return [_run(self.rows, block, blocks, count) for block in range(blocks)]

    def update_is_finite(self) -> bool:
        """Tell whether the sampled rows of the product are free of NaN and infinity."""
        runs, columns = self.grid(_LOOKED_AT)
        return bool(torch.isfinite(self.product.part(index_of(runs), columns, torch.float64)).all())

    @property
    def roundoff(self) -> float:
        """Unit roundoff of the coarsest type in which the delta may have been computed."""
        coarse = UNIT_ROUNDOFF["bfloat16"]
        return max(UNIT_ROUNDOFF.get(self.dtype, coarse), UNIT_ROUNDOFF.get(self.lora_dtype, coarse))

    @property
    def least_drift(self) -> float:
        """Factor on W, less 1, that nobody is blamed for: the step of codes may be kept in bfloat16."""
        coded = any(store.quantised(self.tensor) for store in (self.base, self.merged))
        return _STEP_DRIFT if coded else _LEAST_DRIFT

    @property
    def on_grid(self) -> bool:
        """True when W is stored in the dtype of W'."""
        return self.base.dtype(self.tensor) == self.dtype

    def stream(self, rounding: Rounding, device: str = "cpu") -> RowSums:
        """Read every row once, in chunks; the products of the rows may be made on `device`."""
        before, after = (store.chunks(self.tensor) for store in (self.base, self.merged))
        return self.product.row_sums(before, after, rounding, device=device)

    def window(self, start: int, stop: int) -> Window:
        """Return rows [start, stop) whole."""
        return window(self.product, *self._stored(), self.dtype, (start, stop), self._factors)

    def _factors(self, before: Array, after: Array, product: Array) -> Array:
        """Return what each row of W' was multiplied by: [rows, 1]."""
        return np.ones((len(after), 1))

    def fault(self, scale: float) -> str | None:
        """Say what is wrong beside the scale; None when nothing is."""
        return None

    def blends(self, scale: float, strength: float) -> bool:
        """Tell whether `strength` blends W with the layer at `scale`, where that is another thing than scaling."""
        return False

    def _stored(self) -> tuple[Rows, Rows]:
        """Return what reads rows of W and of W'."""
        return partial(self.base.rows, self.tensor), partial(self.merged.rows, self.tensor)


def _finite(rows: Tensor) -> Tensor:
    """Tell which rows are finite; quick for the types that cannot be summed as they are."""
    wide = rows if rows.dtype.itemsize > 1 else rows.bfloat16()
    return torch.isfinite(torch.linalg.vector_norm(wide, float("inf"), dim=1))


def _run(rows: int, block: int, blocks: int, count: int) -> tuple[int, int]:
    """Return `count` rows from the middle of a block."""
    first, end = rows * block // blocks, rows * (block + 1) // blocks
    start = first + max(0, (end - first - count) // 2)
    return start, min(start + count, end)


def index_of(runs: Runs) -> Tensor:
    """Return the numbers of the rows in `runs`."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


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

    def is_due(self) -> bool:
        """Tell whether the magnitudes alone change the sampled rows by more than rounding, which the merge did not."""
        if self.axis:
            return False
        index = index_of(self._runs(min(BLOCKS, self.rows), 1))
        norms = torch.linalg.vector_norm(
            torch.cat([self._stored()[0](int(at), int(at) + 1) for at in index]).double(), dim=1
        )
        factor = self.magnitude.reshape(-1).double()[index] / norms
        return bool(((factor - 1).abs() > max(_LEAST_OFF, _FACTOR_ROUNDINGS * self.roundoff)).any())

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
        near = (rows.after - wanted).abs() <= TWO_ROUNDINGS * half + slack
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

    def grid(self, elements: int) -> tuple[Runs, slice]:
        """Take more rows of fewer columns where each column has its own factor."""
        if self.axis == 0:
            return super().grid(elements)
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
