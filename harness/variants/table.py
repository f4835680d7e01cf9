"""The table of variants: how the parts of each are drawn, and the direction they add to the weight of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from harness.benches.layer import Kind, Layer
from harness.errors import UserError
from harness.measure.compare import Direction, Fit, low_rank, norm
from harness.measure.tolerance import tolerance
from harness.reference.closed_form import dora_weight, tucker_product
from harness.variants.experts import draw_experts, experts_direction, experts_mistakes
from harness.variants.variant import Parts, Update, Variant

if TYPE_CHECKING:
    from torch import Generator, Tensor

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


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


def biased_mistakes(
    before: Tensor, update: Update, *, expected: float, strength: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield the pair right and the bias with another factor."""
    pair, bias = update.direction.product.clone(), update.direction.product[:, -1:]
    pair[:, -1:] = 0
    trained = expected / strength if strength else 0.0
    for factor, what in ((trained, "without the strength"), (strength, "without alpha / rank"), (1.0, "as it stands")):
        added = expected * pair
        added[:, -1:] += factor * bias
        yield f"the bias is added {what}", before + added
    yield "the bias is left out", before + expected * pair


def draw_dora(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw a pair and a magnitude: [out, 1], spread around 1 so that no normalisation can pass for it."""
    import torch

    return {**draw_pair(layer, rank, generator), "magnitude": 0.5 + torch.rand(layer.rows, 1, generator=generator)}


def dora(before: Tensor, update: Update, scale: float) -> Tensor:
    """Return m * (W + s B A) / |W + s B A|, row by row."""
    return dora_weight(before, scale * update.direction.product, update.parts["magnitude"])


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
    exact = dora(before, update, scale)
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


def dora_mistakes(before: Tensor, update: Update, *, expected: float, strength: float) -> Iterator[tuple[str, Tensor]]:
    """Yield DoRA with another norm, or with the magnitude in another place."""
    delta, magnitude = expected * update.direction.product, update.parts["magnitude"].double().reshape(-1, 1)
    new = before + delta
    rows, columns = (x.square().sum(1, keepdim=True).sqrt() for x in (new, new.T))
    base = before.square().sum(1, keepdim=True).sqrt()
    yield "the norm is taken along the other axis", magnitude * new / columns.T
    yield "the norm is that of the whole matrix (Frobenius)", magnitude * new / norm(new)
    yield "the norm is that of W without the delta", magnitude * new / base
    yield "nothing is divided by the norm", magnitude * new
    yield "W is divided by the norm and the delta is not", magnitude * before / base + delta
    yield "the magnitude is left out", new
    yield "the magnitude multiplies the delta alone", before + magnitude * delta
    yield "the magnitude multiplies the delta alone, over the norm", before + magnitude * delta / rows
    yield (
        "the strength is applied to the finished weight as well",
        before + strength * (magnitude * new / rows - before),
    )


def dora_readings(before: Tensor, update: Update, *, expected: float, strength: float) -> Iterator[tuple[str, Tensor]]:
    """Yield what a strength may mean: a factor on the delta inside the norm, or on what DoRA changes as a whole.

    `expected` is the factor at strength 1.
    """
    delta, magnitude = expected * update.direction.product, update.parts["magnitude"]
    yield "inside the norm", dora_weight(before, strength * delta, magnitude)
    yield "of W and the finished weight", before + strength * (dora_weight(before, delta, magnitude) - before)


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
    return Direction(first.product * second.product, outer.sqrt(), 2 * first.rank)


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
    """Return the Kronecker product w1 ⊗ (w2_a w2_b), or w1 ⊗ w2."""
    import torch

    first, second = parts["lokr_w1"].double(), _second_factor(parts)
    return Direction(torch.kron(first, second.product), torch.kron(first.abs(), second.outer), second.rank)


def _second_factor(parts: Parts) -> Direction:
    if (full := parts.get("lokr_w2")) is None:
        return low_rank(parts["lokr_w2_b"], parts["lokr_w2_a"])
    return Direction(full.double(), full.double().abs(), 1)


def lokr_mistakes(before: Tensor, update: Update, *, expected: float, strength: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the Kronecker product in the other order."""
    import torch

    first, second = update.parts["lokr_w1"].double(), _second_factor(update.parts).product
    yield "the factors of the Kronecker product are exchanged", before + expected * torch.kron(second, first)


def draw_lokr_full(layer: Layer, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw w1: [a, c] and w2: [b, d], both full, and the alpha that trainers write beside them, which means nothing.

    The factor is 1 whatever it says (LyCORIS, `LokrModule`): without a rank there is nothing to divide it by.
    """
    import torch

    (a, b), (c, d) = factors_of(layer.rows), factors_of(layer.columns)
    full = {"lokr_w1": (a, c), "lokr_w2": (b, d)}
    parts = {role: torch.randn(shape, generator=generator) for role, shape in full.items()}
    return {**parts, "alpha": torch.randint(*_ALPHAS, (), generator=generator).float()}


_ALPHAS = 33, 129  # exact in every dtype, and most are no side of a factor, by which a loader may divide
_PARTS = frozenset({"peft", "kohya", "comfyui"})  # formats whose writers take the parts of any variant
_LYCORIS = frozenset({"kohya", "comfyui"})
_LINEAR: frozenset[Kind] = frozenset({"linear"})
_PAIR = draw_pair, pair_direction

_ROWS = (  # in the order in which they are checked and printed
    Variant("lora", *_PAIR),
    Variant("rslora", *_PAIR, formats=frozenset({"peft", "diffusers"}), root=True),
    Variant("conv", *_PAIR, kinds=frozenset({"conv"})),  # LoCon
    Variant(
        "tucker",
        draw_tucker,
        tucker_direction,
        kinds=frozenset({"conv"}),
        formats=_LYCORIS,
        max_rank=lambda layer: 16,
        wants=lambda layer: math.prod(layer.kernel) > 1,
    ),
    Variant(
        "embedding",
        draw_embedding,
        embedding_direction,
        gain=("embedding_B",),
        kinds=frozenset({"embedding"}),
        formats=frozenset({"peft"}),
    ),
    Variant(
        "experts",
        draw_experts,
        experts_direction,
        kinds=frozenset({"experts"}),
        formats=frozenset({"peft"}),
        mistakes=experts_mistakes,
    ),
    Variant(
        "dora",
        draw_dora,
        pair_direction,
        kinds=_LINEAR,
        formats=_PARTS,
        split=False,
        additive=False,
        strengths=(1.0,),
        fit=fit_dora,
        exact=dora,
        mistakes=dora_mistakes,
        readings=dora_readings,
    ),
    Variant("loha", draw_loha, loha_direction, gain=("hada_w2_a",), kinds=_LINEAR, formats=_PARTS),
    Variant(
        "lokr",
        draw_lokr,
        lokr_direction,
        gain=("lokr_w2_a",),
        kinds=_LINEAR,
        formats=_PARTS,
        mistakes=lokr_mistakes,
        max_rank=lokr_rank_limit,
        wants=lambda layer: lokr_rank_limit(layer) > 2,  # of rank 1 alone nobody can tell the law
    ),
    Variant(
        "lokr-full",
        draw_lokr_full,
        lokr_direction,
        gain=("lokr_w2",),
        kinds=_LINEAR,
        formats=_LYCORIS,
        alpha=False,
        beside="an alpha that means nothing, since both factors are full",
        mistakes=lokr_mistakes,
        max_rank=lambda layer: 1,
    ),
    Variant(
        "lora-bias",
        draw_biased,
        biased_direction,
        gain=("B", "bias"),
        kinds=_LINEAR,
        formats=frozenset({"peft"}),
        bias=True,
        mistakes=biased_mistakes,
    ),
    Variant(
        "full",
        draw_full,
        full_direction,
        gain=("diff",),
        kinds=frozenset({"linear", "conv"}),
        formats=_LYCORIS,
        alpha=False,
        max_rank=lambda layer: 1,
    ),
    Variant("qkv-split", *_PAIR, topology="split"),  # trained on q, k and v apart, loaded where they are merged
    Variant("qkv-merged", *_PAIR, topology="merged"),  # the reverse
)
VARIANTS: Mapping[str, Variant] = MappingProxyType({row.name: row for row in _ROWS})


def get_variant(name: str) -> Variant:
    """Return the variant called `name`.

    Raises:
        UserError: no variant has this name.
    """
    if name not in VARIANTS:
        raise UserError(f"variant={name!r}: no such variant; known are {', '.join(VARIANTS)}")
    return VARIANTS[name]
