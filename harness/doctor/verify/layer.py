"""One layer of a checkpoint before and after the merge, beside the product B @ A that a LoRA would add to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.products import Product
from harness.doctor.verify.row_products import row_products
from harness.doctor.verify.vote import Array, half_step, work_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from harness.files import LoraAdapter

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
class Sums:
    """<ΔW, BA> and <BA, BA> of every row, and whether it changed."""

    overlap: Array
    product: Array
    changed: np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Layer:
    """W: [out, in] of `base` and of `merged`, and the halves of the product left @ right: [out, r] @ [r, in]."""

    module: str
    tensor: str
    base: Checkpoint
    merged: Checkpoint
    left: Tensor
    right: Tensor
    lora_dtype: str

    @classmethod
    def of(cls, adapter: LoraAdapter, module: str, tensor: str, base: Checkpoint, merged: Checkpoint) -> Layer | None:
        """Return the layer, or None when the product fits the weight in neither direction (Conv1D, embeddings)."""
        a, b = (half.flatten(1) for half in adapter.tensors(module))
        shape = base.info(tensor).shape
        rows, columns = shape[0], base.info(tensor).elements // max(shape[0], 1)
        turned = bool(adapter.config.get("fan_in_fan_out")) or adapter.modules[module].variant == "embedding"
        if adapter.format == "xlabs" and len(b) < rows:  # it adapts the first rows of FLUX's `linear1`, q, k and v
            b = torch.nn.functional.pad(b, (0, 0, 0, rows - len(b)))
        fits, fits_turned = (rows, columns) == (len(b), a.shape[1]), (rows, columns) == (a.shape[1], len(b))
        if fits_turned and (turned or not fits):
            a, b = b.t(), a.t()
        elif not fits:
            return None
        return cls(module, tensor, base, merged, b, a, _name(b.dtype))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.left)

    @property
    def columns(self) -> int:
        """The number of columns."""
        return int(self.right.shape[1])

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
        stores = (self.base, self.merged)
        base, merged = (torch.cat([store.rows(self.tensor, *run)[:, columns] for run in runs]) for store in stores)
        work = torch.float64 if work_dtype(self.dtype) is np.float64 else torch.float32
        before, after = base.to(work), merged.to(work)
        product = self._update(runs, columns, work)
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

    def _update(self, runs: Runs, columns: slice, work: torch.dtype) -> Tensor:
        """Return what one unit of scale adds there."""
        left = torch.cat([self.left[start:stop] for start, stop in runs])
        return left.to(work) @ self.right[:, columns].to(work)

    def update_is_finite(self) -> bool:
        """Tell whether the sampled rows of the product are free of NaN and infinity."""
        runs, columns = self._grid(_LOOKED_AT)
        return bool(torch.isfinite(self._update(runs, columns, torch.float64)).all())

    @property
    def roundoff(self) -> float:
        """Unit roundoff of the coarsest type in which the delta may have been computed."""
        coarse = UNIT_ROUNDOFF["bfloat16"]
        return max(UNIT_ROUNDOFF.get(self.dtype, coarse), UNIT_ROUNDOFF.get(self.lora_dtype, coarse))

    def stream(self, device: str = "cpu") -> Sums:
        """Read every row once, in chunks: <ΔW, BA> is <ΔW A^T, B>, so that B @ A is never formed.

        The products of the rows are made on `device`.
        """
        before, after = (partial(store.rows, self.tensor) for store in (self.base, self.merged))
        seen = row_products(before, after, self.right, rows=self.rows, bfloat16=self.dtype == "bfloat16", device=device)
        left, gram = self.left.float(), self.right.float() @ self.right.float().t()
        overlap = torch.linalg.vecdot(seen, left)
        product = torch.linalg.vecdot(left @ gram, left)
        return Sums(overlap.double().numpy(), product.double().numpy(), seen.any(1).numpy())


def _run(rows: int, block: int, blocks: int, count: int) -> tuple[int, int]:
    """Return `count` rows from the middle of a block."""
    first, end = rows * block // blocks, rows * (block + 1) // blocks
    start = first + max(0, (end - first - count) // 2)
    return start, min(start + count, end)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class ProductLayer(Layer):
    """A layer with any product; `left` and `right` are empty."""

    product: Product

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.product.shape[0]

    @property
    def columns(self) -> int:
        """The number of columns."""
        return self.product.shape[1]

    def stream(self, device: str = "cpu") -> Sums:
        """Read every row once, in chunks in which the product is formed, on the processor whatever the `device`."""
        step = max(1, _CHUNK_ELEMENTS // self.columns)
        starts = range(0, self.rows, step)
        found = [self._chunk(start, min(start + step, self.rows)) for start in starts]
        overlap, product, changed = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Sums(overlap, product, changed)

    def _chunk(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        before, after, product = (part.double().numpy() for part in self._read((start, stop)))
        changed = (after != before).any(axis=1)
        change = self._unfactored(before, after, product) - before
        return np.einsum("ij,ij->i", change, product), np.einsum("ij,ij->i", product, product), changed

    def _unfactored(self, before: Array, after: Array, product: Array) -> Array:
        """Return rows of W' without what they were multiplied by."""
        return after

    def _read(self, run: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return some rows of W, W' and the product."""
        work = torch.float64 if self.dtype in ("float32", "float64") else torch.float32
        before, after = (store.rows(self.tensor, *run).to(work) for store in (self.base, self.merged))
        return before, after, self.product.part(torch.arange(*run), work)

    def _update(self, runs: Runs, columns: slice, work: torch.dtype) -> Tensor:
        return self.product.part(index_of(runs), work)[:, columns]


def index_of(runs: Runs) -> Tensor:
    """Return the numbers of the rows in `runs`."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs])
