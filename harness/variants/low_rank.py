"""The plain pair A and B, on every kind of layer; and with a bias, with DoRA's magnitude."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harness.benches.layer import Layer
from harness.measure.compare import Direction, Fit, low_rank, norm
from harness.measure.tolerance import tolerance
from harness.reference.closed_form import dora_weight, tucker_product
from harness.variants.variant import Parts, Update

if TYPE_CHECKING:
    from torch import Generator, Tensor


def draw_pair(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw A: [rank, in, *kernel] and B: [out, rank, 1, ...]."""
    import torch

    a = torch.randn(rank, layer.channels, *layer.kernel, generator=generator) / math.sqrt(layer.columns)
    b = torch.randn(layer.rows, rank, *(1 for _ in layer.kernel), generator=generator)
    return {"A": a, "B": b}


def pair_direction(parts: Parts, layer: Layer) -> Direction:
    """Return B @ A: [rows, columns], a column per kernel place."""
    return low_rank(parts["A"].flatten(1), parts["B"].flatten(1))


def draw_embedding(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw A: [rank, tokens] and B: [width, rank]."""
    pair = draw_pair(layer, rank, generator)
    return {"embedding_A": pair["A"], "embedding_B": pair["B"]}


def embedding_direction(parts: Parts, layer: Layer) -> Direction:
    """Return B @ A: [width, tokens], the transpose of what is added to the table."""
    return low_rank(parts["embedding_A"], parts["embedding_B"])


def draw_biased(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw a pair and the bias of B: [out]."""
    import torch

    return {**draw_pair(layer, rank, generator), "bias": torch.randn(layer.rows, generator=generator)}


def biased_direction(parts: Parts, layer: Layer) -> Direction:
    """Return [B @ A, bias of B]: the bias has the same factor (PEFT `lora_bias`)."""
    import torch

    pair, bias = pair_direction(parts, layer), parts["bias"].double()[:, None]
    return Direction(torch.cat([pair.product, bias], 1), torch.cat([pair.outer, bias.abs()], 1), pair.rank)


def draw_dora(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw a pair and a magnitude: [out, 1], spread around 1 so that no normalisation can pass for it."""
    import torch

    return {**draw_pair(layer, rank, generator), "magnitude": 0.5 + torch.rand(layer.rows, 1, generator=generator)}


def fit_dora(before: Tensor, after: Tensor, update: Update, *, expected: float, dtype: str) -> Fit:
    """Fit W' = m * (W + s B A) / |W + s B A|, row by row, for the scale s.

    Each row is W'_o = c_o W_o + c_o s (B A)_o: two unknowns, solved by least squares; s is the mean of the rows'
    own, each weighted by how well its direction determines it. What is left over is the residual.
    """
    p = update.direction.product
    ww, wp, pp = ((x * y).sum(1) for x, y in ((before, before), (before, p), (p, p)))
    wa, pa = (before * after).sum(1), (p * after).sum(1)
    determinant = ww * pp - wp**2
    c, cs = (wa * pp - pa * wp) / determinant, (pa * ww - wa * wp) / determinant
    weight = determinant / ww
    scale = float((weight * c * cs).sum() / (weight * c * c).sum())
    exact = dora_weight(before, scale * p, update.parts["magnitude"])
    allowed = tolerance(
        dtype=dtype,
        scale=max(abs(scale), abs(expected)),
        elements=p.numel(),
        base=norm(before),
        merged=3 * norm(after),  # the sum, its norm, the quotient and the product are rounded too
        product=norm(p) * norm(exact) / norm(before + scale * p),
        outer=norm(update.direction.outer),
        rank=update.direction.rank,
    )
    return Fit(scale, norm(after - exact), norm(after - before), norm(p), allowed, expected)


def full_direction(parts: Parts, layer: Layer) -> Direction:
    """Return the whole difference as a matrix: [rows, columns]."""
    diff = parts["diff"].double()
    diff = diff.T if layer.kind == "transposed" else diff.flatten(1)
    return Direction(diff, diff.abs(), 1)


def draw_full(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw a difference in the shape in which the layer stores its weight."""
    import torch

    shape = (layer.columns, layer.rows) if layer.kind == "transposed" else (layer.rows, layer.channels, *layer.kernel)
    return {"diff": torch.randn(shape, generator=generator)}


def draw_tucker(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw A: [rank, in, 1, 1], the core: [rank, rank, *kernel] and B: [out, rank, 1, 1]."""
    import torch

    ones = [1 for _ in layer.kernel]
    return {
        "A": torch.randn(rank, layer.channels, *ones, generator=generator) / math.sqrt(layer.channels),
        "mid": torch.randn(rank, rank, *layer.kernel, generator=generator) / rank,
        "B": torch.randn(layer.rows, rank, *ones, generator=generator),
    }


def tucker_direction(parts: Parts, layer: Layer) -> Direction:
    """Return the Tucker product: [rows, columns]."""
    squares = (parts[role].double().square() for role in ("A", "B", "mid"))
    outer = tucker_product(*squares).sqrt()
    full = tucker_product(parts["A"], parts["B"], parts["mid"])
    return Direction(full.flatten(1), outer.flatten(1), 2 * int(parts["mid"].shape[0]))
