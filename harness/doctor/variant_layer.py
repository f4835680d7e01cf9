"""A layer whose update is no plain B @ A, but any product of factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.doctor.layer import Layer, Runs, Sums
from harness.doctor.products import Product
from harness.doctor.vote import Array

if TYPE_CHECKING:
    from torch import Tensor

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
