"""What one unit of scale adds to a weight: a matrix of which any rows can be had without the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.doctor.verify.row_products import Rows, row_products
from harness.doctor.verify.rows import Looks, Rounding, RowSums, Window
from harness.doctor.verify.vote import Array, half_step, stored_as

_CHUNK_ELEMENTS = 1 << 20
_ALL = slice(None)
_EXACT = {
    "float64": 1e-9,
    "float32": 1e-5,
    "bfloat16": 1e-2,
}  # relative error of the sums of a row, by their arithmetic
Factors = Callable[[Array, Array, Array], Array]


class Product(ABC):
    """A matrix given by its factors."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    @abstractmethod
    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns: [len(rows), columns], computed in `work`."""

    @abstractmethod
    def turned(self) -> Product:
        """Return the transpose."""

    def sliced(self, start: int, stop: int) -> Product:
        """Return rows [start, stop)."""
        return Slice(self, start, stop)

    def picked(self, runs: Sequence[tuple[int, int]]) -> Product:
        """Return some runs of rows, one below the other; all rows where there are none."""
        if not runs:
            return self
        if len(runs) == 1:
            return self.sliced(*runs[0])
        return self.at(torch.cat([torch.arange(*run) for run in runs]))

    def at(self, index: Tensor) -> Product:
        """Return the rows of these numbers, in this order."""
        return Picked(self, index)

    def row_sums(self, before: Rows, after: Rows, rounding: Rounding, *, device: str = "cpu") -> RowSums:
        """Compare with every row of W and W' in one pass; `device` may make the products."""
        return sums_by_chunk(self, before, after, rounding)


def sums_by_chunk(
    product: Product,
    before: Rows,
    after: Rows,
    rounding: Rounding,
    factors: Factors = lambda before, after, product: np.ones((len(after), 1)),
) -> RowSums:
    """Return the sums of every row, from chunks in which the product is formed.

    `factors` returns what the rows of W' were multiplied by, given those of W, of W' and of the product.
    """
    rows, columns = product.shape
    step, looks = max(1, _CHUNK_ELEMENTS // columns), Looks(rounding, _ALL)

    def sums(start: int) -> tuple[Any, ...]:
        run = start, min(start + step, rows)
        seen = window(product, before, after, rounding.dtype, run, factors)
        looks.compare(seen.before, seen.after, seen.product, seen.half)
        change = seen.after - seen.before
        pairs = (change, seen.product), (seen.product, seen.product), (change, change)
        return *(np.einsum("ij,ij->i", *pair) for pair in pairs), seen.changed.any(axis=1)

    found = [np.concatenate(parts) for parts in zip(*map(sums, range(0, rows, step)), strict=True)]
    looked = np.concatenate(looks.misfit), np.concatenate(looks.allowed)
    return RowSums(found[0], found[1], found[2], found[3], *looked, _EXACT["float64"])


def window(product: Product, before: Rows, after: Rows, dtype: str, run: tuple[int, int], factors: Factors) -> Window:
    """Return some rows, with what they were multiplied by taken out."""
    work = torch.float64 if dtype in ("float32", "float64") else torch.float32
    stored, merged = before(*run), after(*run)
    changed = (stored_as(stored, dtype).to(work) != merged.to(work)).numpy()
    update = product.part(torch.arange(*run), _ALL, work).double().numpy()
    old, new = (part.to(work).double().numpy() for part in (stored, merged))
    with np.errstate(all="ignore"):
        factor = factors(old, new, update)
        return Window(old, new / factor, update, half_step(new, dtype) / np.abs(factor), changed)


@dataclass(frozen=True)
class LowRank(Product):
    """left @ right: [rows, r] @ [r, columns]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.left.shape[0], self.right.shape[1]

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        return self.left[rows].to(work) @ self.right[:, columns].to(work)

    def turned(self) -> Product:
        """Return the transpose."""
        return LowRank(self.right.t(), self.left.t())

    def sliced(self, start: int, stop: int) -> Product:
        """Return rows [start, stop)."""
        return LowRank(self.left[start:stop], self.right)

    def at(self, index: Tensor) -> Product:
        """Return the rows of these numbers, in this order."""
        return LowRank(self.left[index], self.right)

    def row_sums(self, before: Rows, after: Rows, rounding: Rounding, *, device: str = "cpu") -> RowSums:
        """Make <ΔW, BA> as <ΔW A^T, B>, so that B @ A is formed for a few columns only."""
        half, looks = rounding.dtype == "bfloat16", Looks.at(rounding, self.shape[1])
        old, new = self._watched(before, after, looks)
        overlap, energy = row_products(old, new, self.left, self.right, bfloat16=half, device=device)
        left, gram = self.left.float(), self.right.float() @ self.right.float().t()
        product = torch.linalg.vecdot(left @ gram, left)
        return RowSums(
            overlap.double().numpy(),
            product.double().numpy(),
            energy.double().numpy(),
            (energy != 0).numpy(),
            np.concatenate(looks.misfit),
            np.concatenate(looks.allowed),
            _EXACT["bfloat16" if half else "float32"],
        )

    def _watched(self, before: Rows, after: Rows, looks: Looks) -> tuple[Rows, Rows]:
        """Return the readers of W and of W', which let `looks` see every chunk that both have read."""
        right, passed = self.right[:, looks.columns].float(), dict[str, Tensor]()

        def reader(rows: Rows, name: str) -> Rows:
            def read(start: int, stop: int) -> Tensor:
                chunk = rows(start, stop)
                passed[name] = chunk[:, looks.columns]
                if len(passed) == 2:
                    product = self.left[start:stop].float() @ right
                    looks.take(passed.pop("before"), passed.pop("after"), product)
                return chunk

            return read

        return reader(before, "before"), reader(after, "after")


@dataclass(frozen=True)
class Whole(Product):
    """A matrix that the file holds as it is."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        return self.matrix[rows][:, columns].to(work)

    def turned(self) -> Product:
        """Return the transpose."""
        return Whole(self.matrix.t())


@dataclass(frozen=True)
class Slice(Product):
    """Some rows of a product."""

    whole: Product
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.stop - self.start, self.whole.shape[1]

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        return self.whole.part(rows + self.start, columns, work)

    def turned(self) -> Product:
        """Return itself: rows are cut from what lies as the weight does."""
        return self


@dataclass(frozen=True)
class Picked(Product):
    """Some rows of a product, by their numbers."""

    whole: Product
    index: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.index), self.whole.shape[1]

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        return self.whole.part(self.index[rows], columns, work)

    def turned(self) -> Product:
        """Return itself: rows are picked from what lies as the weight does."""
        return self


@dataclass(frozen=True)
class ScaledProduct(Product):
    """A product in the codes of a weight: over the scales that `step` returns for rows, [rows or 1, columns or 1]."""

    whole: Product
    step: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.whole.shape

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        first, last = int(rows.min()), int(rows.max()) + 1
        step = self.step(first, last).to(work)
        own = step if len(step) == 1 else step[rows - first]
        return self.whole.part(rows, columns, work) / (own if own.shape[1] == 1 else own[:, columns])

    def turned(self) -> Product:
        """Return itself: rows have their scales as the weight lies."""
        return self


@dataclass(frozen=True)
class Experts(Product):
    """left[e] @ right[e] of every expert e, one below the other: [experts, rows, r] @ [experts, r, columns]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), the rows of all experts."""
        return self.left.shape[0] * self.left.shape[1], self.right.shape[2]

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        own = self.right[:, :, columns]
        found = torch.empty(len(rows), own.shape[2], dtype=work)
        owners = rows // self.left.shape[1]
        for expert in sorted(set(owners.tolist())):
            picked = owners == expert
            found[picked] = self.left[expert][rows[picked] % self.left.shape[1]].to(work) @ own[expert].to(work)
        return found

    def turned(self) -> Product:
        """Return that of the transposed matrices."""
        return Experts(self.right.transpose(1, 2), self.left.transpose(1, 2))


@dataclass(frozen=True)
class Total(Product):
    """The sum of products, each times a factor."""

    parts: tuple[tuple[Product, float], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.parts[0][0].shape

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        return torch.stack([factor * one.part(rows, columns, work) for one, factor in self.parts]).sum(0)

    def turned(self) -> Product:
        """Return the transpose."""
        return Total(tuple((one.turned(), factor) for one, factor in self.parts))


@dataclass(frozen=True)
class Combined(Product):
    """A product of two others."""

    first: Product
    second: Product

    def turned(self) -> Product:
        """Return the transpose."""
        return type(self)(self.first.turned(), self.second.turned())


class Hadamard(Combined):
    """first * second, element by element (LoHa)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.first.shape

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        return self.first.part(rows, columns, work) * self.second.part(rows, columns, work)


class Kronecker(Combined):
    """first ⊗ second (LoKr): row a * b_n + b is the Kronecker product of row a of `first` and row b of `second`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.first.shape[0] * self.second.shape[0], self.first.shape[1] * self.second.shape[1]

    def part(self, rows: Tensor, columns: slice, work: torch.dtype) -> Tensor:
        """Return some rows and columns."""
        height = self.second.shape[0]
        small, large = self.first.part(rows // height, _ALL, work), self.second.part(rows % height, _ALL, work)
        return (small[:, :, None] * large[:, None, :]).flatten(1)[:, columns]
