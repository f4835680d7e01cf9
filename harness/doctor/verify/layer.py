"""One layer of a checkpoint before and after the merge, beside the product B @ A that a LoRA would add to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.products import Product, RowSums
from harness.doctor.verify.row_products import Rows
from harness.doctor.verify.vote import Array, half_step, work_dtype

BLOCKS = 12  # a multiple of 2, 3, 4 and 6: q/k/v, k/v and gate/up lie in blocks of their own
_LOOKED_AT = 16_000  # elements
Runs = list[tuple[int, int]]
UNIT_ROUNDOFF = {"float64": 2.0**-40, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Sample:
    """Rows of one layer as arrays [rows, columns]; of a layer of `rows`.

    `block` gives each row's block, `roundoff` is that of the delta.
    """

    base: Array
    change: Array
    product: Array
    half: Array
    changed: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    block: np.ndarray[tuple[int], np.dtype[np.int_]]
    dtype: str
    roundoff: float
    rows: int

    def rounded(self, values: Array) -> Array:
        """Return `values` rounded to the dtype of the merge."""
        stored = torch.from_numpy(values).to(getattr(torch, self.dtype))
        return stored.to(torch.from_numpy(values[:0]).dtype).numpy()


@dataclass(frozen=True)
class MergedLayer:
    """W: [out, in] of `base` and of `merged`, and the product that a LoRA would add to it."""

    tensor: str
    base: Checkpoint
    merged: Checkpoint
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

    @property
    def dtype(self) -> str:
        """The dtype the merge was stored in."""
        return self.merged.dtype(self.tensor)

    @property
    def streams(self) -> bool:
        """True when all rows can be measured in one pass."""
        return True

    def sample(self, elements: int) -> Sample:
        """Return about `elements` elements: the same columns of at least one row from every block of rows."""
        runs, columns = self._grid(elements)
        base, merged = (torch.cat([rows(*run)[:, columns] for run in runs]) for rows in self._stored())
        work = torch.float64 if work_dtype(self.dtype) is np.float64 else torch.float32
        before, after = base.to(work), merged.to(work)
        product = self.product.part(index_of(runs), columns, work)
        return Sample(
            base=before.numpy(),
            change=(after - before).numpy(),
            product=product.numpy(),
            half=half_step(after.numpy(), self.dtype),
            changed=(base.to(merged.dtype).to(work) != after).numpy(),
            block=np.repeat(np.arange(len(runs)), [stop - start for start, stop in runs]),
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

    def stream(self, device: str = "cpu") -> RowSums:
        """Read every row once, in chunks; the products of the rows may be made on `device`."""
        chunks = (store.chunks(self.tensor) for store in (self.base, self.merged))
        return self.product.row_sums(*chunks, dtype=self.dtype, device=device)

    def fault(self, scale: float) -> str | None:
        """Say what is wrong beside the scale; None when nothing is."""
        return None

    def blends(self, scale: float, strength: float) -> bool:
        """Tell whether `strength` blends W with the layer at `scale`, where that is another thing than scaling."""
        return False

    def _stored(self) -> tuple[Rows, Rows]:
        """Return what reads rows of W and of W'."""
        return partial(self.base.rows, self.tensor), partial(self.merged.rows, self.tensor)


def _run(rows: int, block: int, blocks: int, count: int) -> tuple[int, int]:
    """Return `count` rows from the middle of a block."""
    first, end = rows * block // blocks, rows * (block + 1) // blocks
    start = first + max(0, (end - first - count) // 2)
    return start, min(start + count, end)


def index_of(runs: Runs) -> Tensor:
    """Return the numbers of the rows in `runs`."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs])
