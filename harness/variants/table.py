"""The table of variants: one row each, in the order in which they are checked and printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from harness.benches.layer import Kind
from harness.errors import UserError
from harness.variants import parts
from harness.variants.variant import Variant

_PARTS = frozenset({"peft", "kohya", "comfyui"})  # formats whose writers take the parts of any variant
_LYCORIS = frozenset({"kohya", "comfyui"})
_LINEAR: frozenset[Kind] = frozenset({"linear"})
_WEIGHTS: frozenset[Kind] = frozenset({"linear", "conv"})
_PAIR = parts.draw_pair, parts.pair_direction

_ROWS = (
    Variant("lora", "B @ A on linear layers", *_PAIR),
    Variant("rslora", "alpha / sqrt(rank)", *_PAIR, formats=frozenset({"peft", "diffusers"}), root=True),
    Variant("conv", "B @ A on convolutions, 1x1 and 3x3 (LoCon)", *_PAIR, kinds=frozenset({"conv"})),
    Variant(
        "tucker",
        "convolutions with a core (LoCon with lora_mid)",
        *(parts.draw_tucker, parts.tucker_direction),
        kinds=frozenset({"conv"}),
        formats=_LYCORIS,
        max_rank=lambda layer: 16,
        wants=lambda layer: math.prod(layer.kernel) > 1,
    ),
    Variant(
        "embedding",
        "the rows of an embedding table",
        *(parts.draw_embedding, parts.embedding_direction),
        gain=("embedding_B",),
        kinds=frozenset({"embedding"}),
        formats=frozenset({"peft"}),
    ),
    Variant(
        "dora",
        "magnitude and direction",
        *(parts.draw_dora, parts.pair_direction),
        kinds=_LINEAR,
        formats=_PARTS,
        split=False,
        additive=False,
        strengths=(1.0,),
        fit=parts.fit_dora,
    ),
    Variant(
        "loha",
        "product of two low-rank matrices, element by element",
        *(parts.draw_loha, parts.loha_direction),
        gain=("hada_w2_a",),
        kinds=_LINEAR,
        formats=_PARTS,
    ),
    Variant(
        "lokr",
        "Kronecker product of a full and a low-rank matrix",
        *(parts.draw_lokr, parts.lokr_direction),
        gain=("lokr_w2_a",),
        kinds=_LINEAR,
        formats=_PARTS,
        max_rank=parts.lokr_rank_limit,
        wants=lambda layer: parts.lokr_rank_limit(layer) > 2,  # of rank 1 alone nobody can tell the law
    ),
    Variant(
        "lora-bias",
        "a bias beside B @ A",
        *(parts.draw_biased, parts.biased_direction),
        gain=("B", "bias"),
        kinds=_LINEAR,
        formats=frozenset({"peft"}),
        bias=True,
    ),
    Variant(
        "full",
        "the whole difference of a weight",
        *(parts.draw_full, parts.full_direction),
        gain=("diff",),
        kinds=_WEIGHTS,
        formats=_LYCORIS,
        alpha=False,
        max_rank=lambda layer: 1,
    ),
    Variant("qkv-split", "trained on q, k and v apart, loaded where they are merged", *_PAIR, topology="split"),
    Variant("qkv-merged", "trained on merged q, k and v, loaded where they are apart", *_PAIR, topology="merged"),
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
