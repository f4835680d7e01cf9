"""What one unit of scale adds to a weight: a matrix of which any rows can be had without the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from harness.files import LoraAdapter


class Product(Protocol):
    """A matrix given by its factors."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    def part(self, rows: Tensor, work: dtype) -> Tensor:
        """Return some rows: [len(rows), columns], computed in `work`."""

    def turned(self) -> Product:
        """Return the transpose."""


@dataclass(frozen=True)
class LowRank:
    """left @ right: [rows, r] @ [r, columns]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.left.shape[0], self.right.shape[1]

    def part(self, rows: Tensor, work: dtype) -> Tensor:
        """Return some rows."""
        return self.left[rows].to(work) @ self.right.to(work)

    def turned(self) -> Product:
        """Return the transpose."""
        return LowRank(self.right.t(), self.left.t())


@dataclass(frozen=True)
class Whole:
    """A matrix that the file holds as it is."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def part(self, rows: Tensor, work: dtype) -> Tensor:
        """Return some rows."""
        return self.matrix[rows].to(work)

    def turned(self) -> Product:
        """Return the transpose."""
        return Whole(self.matrix.t())


@dataclass(frozen=True)
class Hadamard:
    """first * second, element by element (LoHa)."""

    first: Product
    second: Product

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.first.shape

    def part(self, rows: Tensor, work: dtype) -> Tensor:
        """Return some rows."""
        return self.first.part(rows, work) * self.second.part(rows, work)

    def turned(self) -> Product:
        """Return the transpose."""
        return Hadamard(self.first.turned(), self.second.turned())


@dataclass(frozen=True)
class Kronecker:
    """small ⊗ large (LoKr): row a * b_n + b is the Kronecker product of row a of `small` and row b of `large`."""

    small: Product
    large: Product

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.small.shape[0] * self.large.shape[0], self.small.shape[1] * self.large.shape[1]

    def part(self, rows: Tensor, work: dtype) -> Tensor:
        """Return some rows."""
        height = self.large.shape[0]
        small, large = self.small.part(rows // height, work), self.large.part(rows % height, work)
        return (small[:, :, None] * large[:, None, :]).flatten(1)

    def turned(self) -> Product:
        """Return the transpose."""
        return Kronecker(self.small.turned(), self.large.turned())


def pair_product(adapter: LoraAdapter, name: str) -> Product:
    """Return B @ A, or with a Tucker core the product of the core with both: rank columns on the left either way.

    Tucker: delta[o, i, k] = sum_pq B[o, p] mid[p, q, k] A[q, i].
    """
    a, b = (half.flatten(1) for half in adapter.tensors(name))
    if "mid" not in adapter.modules[name].keys:
        return LowRank(b, a)
    return LowRank(b, _cored(adapter.part(name, "mid"), a))


def loha_product(adapter: LoraAdapter, name: str) -> Product:
    """Return (w1_a w1_b) * (w2_a w2_b); with a Tucker core t: [r, r, *kernel], w_a is [r, out]."""
    halves = []
    for number in "12":
        a, b = (adapter.part(name, f"hada_w{number}_{side}") for side in "ab")
        core = f"hada_t{number}"
        tucker = core in adapter.modules[name].keys
        halves.append(LowRank(a.t(), _cored(adapter.part(name, core), b)) if tucker else LowRank(a, b))
    return Hadamard(halves[0], halves[1])


def lokr_product(adapter: LoraAdapter, name: str) -> Product:
    """Return w1 ⊗ w2, each full or low-rank; the kernel of a convolution lies in the columns of w2."""
    return Kronecker(_lokr_factor(adapter, name, "lokr_w1"), _lokr_factor(adapter, name, "lokr_w2"))


def _lokr_factor(adapter: LoraAdapter, name: str, role: str) -> Product:
    keys = adapter.modules[name].keys
    if role in keys:
        return Whole(adapter.part(name, role).flatten(1))
    a, b = adapter.part(name, f"{role}_a"), adapter.part(name, f"{role}_b")
    if role == "lokr_w2" and "lokr_t2" in keys:
        return LowRank(a.t(), _cored(adapter.part(name, "lokr_t2"), b))
    return LowRank(a, b.flatten(1))


def _cored(core: Tensor, right: Tensor) -> Tensor:
    """Return sum_q core[p, q, k] right[q, i]: [p, i * k]."""
    import torch

    return torch.einsum("pq...,qi->pi...", core.float(), right.float()).flatten(1)


def whole_product(adapter: LoraAdapter, name: str, role: str) -> Product:
    """Return a tensor of the file as a matrix; a vector is one column."""
    tensor = adapter.part(name, role)
    return Whole(tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1))
