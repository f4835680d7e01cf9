"""Experts whose matrices are stacked in one parameter: a pair of low rank each, as PEFT stacks them in two tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.benches.layer import Layer
from harness.measure.compare import Direction, low_rank
from harness.variants.variant import Parts, Update

if TYPE_CHECKING:
    from torch import Generator, Tensor


def draw_experts(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw A: [experts * rank, in], by expert, and B: [out, rank * experts], by rank, as PEFT stores them."""
    import torch

    rows = layer.rows // layer.experts
    a = torch.randn(layer.experts * rank, layer.columns, generator=generator) / math.sqrt(layer.columns)
    return {"A": a, "B": torch.randn(rows, rank * layer.experts, generator=generator)}


def experts_direction(parts: Parts, layer: Layer) -> Direction:
    """Return B_e @ A_e of each expert, one below the other: [experts * out, in]."""
    import torch

    a = parts["A"].reshape(layer.experts, -1, layer.columns)
    b = parts["B"].reshape(len(parts["B"]), -1, layer.experts).movedim(2, 0)
    each = [low_rank(*pair) for pair in zip(a, b, strict=True)]
    return Direction(torch.cat([d.product for d in each]), torch.cat([d.outer for d in each]), each[0].rank)


def experts_mistakes(
    before: Tensor, update: Update, *, expected: float, strength: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield the halves cut up in the other order."""
    a, b, columns = update.parts["A"].double(), update.parts["B"].double(), before.shape[1]
    experts = len(before) // len(b)
    first, second = a.reshape(experts, -1, columns), b.reshape(len(b), -1, experts).movedim(2, 0)
    other = b.reshape(len(b), experts, -1).movedim(1, 0)
    yield "B is cut by expert, and should be by rank", before + expected * (other @ first).flatten(0, 1)
    other = a.reshape(-1, experts, columns).movedim(1, 0)
    yield "A is cut by rank, and should be by expert", before + expected * (second @ other).flatten(0, 1)
