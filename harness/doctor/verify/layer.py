"""One layer of a checkpoint before and after the merge, beside the product B @ A that a LoRA would add to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from harness.doctor.verify.pairing import Weights
from harness.doctor.verify.products import Product, window
from harness.doctor.verify.row_products import Rows
from harness.doctor.verify.rows import Rounding, RowSums, Window
from harness.doctor.verify.vote import Array, Flags, half_step, work_dtype

BLOCKS = 12  # a multiple of 2, 3, 4 and 6: q/k/v, k/v and gate/up lie in blocks of their own
_LOOKED_AT = 16_000  # elements
_MOST_ROWS = 0.9  # share of the rows that must be values of a coarser dtype: some may be damaged
Runs = list[tuple[int, int]]
UNIT_ROUNDOFF = {"float64": 2.0**-40, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Sample:
    """Rows of one layer as arrays [rows, columns]; of a layer of `rows`.

    `block` gives each row's block, `index` its number, `finite` says that everything read of it is, also in the columns
    left out; `roundoff` is that of the delta.
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

    def of(self, rows: Flags) -> Sample:
        """Return the sample of the flagged rows alone."""
        names = ("base", "change", "product", "half", "changed", "block", "index", "finite")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def rounded(self, values: Array) -> Array:
        """Return `values` rounded to the dtype of the merge."""
        stored = torch.from_numpy(values).to(getattr(torch, self.dtype))
        return stored.to(torch.from_numpy(values[:0]).dtype).numpy()


@dataclass(frozen=True)
class MergedLayer:
    """W: [out, in] of `base` and of `merged`, and the product that a LoRA would add to it."""

    tensor: str
    base: Weights
    merged: Weights
    product: Product
    lora_dtype: str

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
        runs, columns = self._grid(elements)
        read = [torch.cat([rows(*run) for run in runs]) for rows in self._stored()]
        finite = torch.stack([_finite(part) for part in read]).all(dim=0).numpy()
        base, merged = (part[:, columns] for part in read)
        work = torch.float64 if work_dtype(self.dtype) is np.float64 else torch.float32
        before, after = base.to(work), merged.to(work)
        product = self.product.part(index_of(runs), columns, work)
        return Sample(
            base=before.numpy(),
            change=(after - before).numpy(),
            product=product.numpy(),
            half=half_step(after.numpy(), self.dtype),
            changed=(base.to(getattr(torch, self.dtype)).to(work) != after).numpy(),
            block=np.repeat(np.arange(len(runs)), [stop - start for start, stop in runs]),
            index=index_of(runs).numpy(),
            finite=finite,
            dtype=self.dtype,
            roundoff=self.roundoff,
            rows=self.rows,
        )

    def _grid(self, elements: int) -> tuple[Runs, slice]:
        """Return the rows to read, a run in each block, and the columns."""
        blocks = min(BLOCKS, self.rows)
        columns = slice(0, None, max(1, blocks * self.columns // elements))
        count = max(1, -(-elements // (blocks * len(range(self.columns)[columns]))))
        return self._runs(blocks, count), columns

    def _runs(self, blocks: int, count: int) -> Runs:
        return [_run(self.rows, block, blocks, count) for block in range(blocks)]

    def update_is_finite(self) -> bool:
        """Tell whether the sampled rows of the product are free of NaN and infinity."""
        runs, columns = self._grid(_LOOKED_AT)
        return bool(torch.isfinite(self.product.part(index_of(runs), columns, torch.float64)).all())

    @property
    def roundoff(self) -> float:
        """Unit roundoff of the coarsest type in which the delta may have been computed."""
        coarse = UNIT_ROUNDOFF["bfloat16"]
        return max(UNIT_ROUNDOFF.get(self.dtype, coarse), UNIT_ROUNDOFF.get(self.lora_dtype, coarse))

    @property
    def on_grid(self) -> bool:
        """True when W is stored in the dtype of W'."""
        return self.base.dtype(self.tensor) == self.dtype

    def stream(self, rounding: Rounding, device: str = "cpu") -> RowSums:
        """Read every row once, in chunks; the products of the rows may be made on `device`."""
        return self.product.row_sums(
            *(store.chunks(self.tensor) for store in (self.base, self.merged)), rounding, device=device
        )

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
