"""LoHa and LoKr: products of two low-rank matrices, element by element or Kronecker's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harness.benches.layer import Layer
from harness.measure.compare import Direction, low_rank
from harness.reference.closed_form import loha_product, lokr_product
from harness.variants.variant import Parts

if TYPE_CHECKING:
    from torch import Generator, Tensor

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def draw_loha(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw two pairs a: [rows, rank] and b: [rank, columns]."""
    import torch

    shapes = ((layer.rows, rank), (rank, layer.columns)) * 2
    return {role: torch.randn(shape, generator=generator) for role, shape in zip(_HADA, shapes, strict=True)}


def loha_direction(parts: Parts, layer: Layer) -> Direction:
    """Return (w1_a w1_b) * (w2_a w2_b), element by element."""
    w1_a, w1_b, w2_a, w2_b = (parts[role] for role in _HADA)
    first, second = low_rank(w1_b, w1_a), low_rank(w2_b, w2_a)
    outer = (first.outer * second.product).square() + (second.outer * first.product).square()
    return Direction(loha_product((w1_a, w1_b), (w2_a, w2_b)), outer.sqrt(), 2 * first.rank)


def factors_of(number: int) -> tuple[int, int]:
    """Return the two factors of `number` nearest to its root, the smaller first (LyCORIS' and PEFT's choice)."""
    small = max(n for n in range(1, math.isqrt(number) + 1) if number % n == 0)
    return small, number // small


def lokr_rank_limit(layer: Layer) -> int:
    """Return the largest rank at which trainers keep the second factor low-rank: below half its larger side."""
    sides = factors_of(layer.rows)[1], factors_of(layer.columns)[1]
    return max(1, (max(sides) - 1) // 2)


def draw_lokr(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw a full w1: [a, c] and a low-rank w2: [b, rank] @ [rank, d], where rows = a b and columns = c d."""
    import torch

    (a, b), (c, d) = factors_of(layer.rows), factors_of(layer.columns)
    shapes = {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d)}
    return {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}


def lokr_direction(parts: Parts, layer: Layer) -> Direction:
    """Return the Kronecker product w1 ⊗ (w2_a w2_b)."""
    second = low_rank(parts["lokr_w2_b"], parts["lokr_w2_a"])
    first = parts["lokr_w1"].double()
    outer = lokr_product((first.abs(),), (second.outer,))
    return Direction(lokr_product((first,), (second.product,)), outer, second.rank)
