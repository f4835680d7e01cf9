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
_PAIR = parts.draw_pair, parts.pair_direction

_ROWS = (
    Variant("lora", *_PAIR),
    Variant("rslora", *_PAIR, formats=frozenset({"peft", "diffusers"}), root=True),
    Variant("conv", *_PAIR, kinds=frozenset({"conv"})),  # LoCon
    Variant(
        "tucker",
        parts.draw_tucker,
        parts.tucker_direction,
        kinds=frozenset({"conv"}),
        formats=_LYCORIS,
        max_rank=lambda layer: 16,
        wants=lambda layer: math.prod(layer.kernel) > 1,
    ),
    Variant(
        "embedding",
        parts.draw_embedding,
        parts.embedding_direction,
        gain=("embedding_B",),
        kinds=frozenset({"embedding"}),
        formats=frozenset({"peft"}),
    ),
    Variant(
        "dora",
        parts.draw_dora,
        parts.pair_direction,
        kinds=_LINEAR,
        formats=_PARTS,
        split=False,
        additive=False,
        strengths=(1.0,),
        fit=parts.fit_dora,
    ),
    Variant("loha", parts.draw_loha, parts.loha_direction, gain=("hada_w2_a",), kinds=_LINEAR, formats=_PARTS),
    Variant(
        "lokr",
        parts.draw_lokr,
        parts.lokr_direction,
        gain=("lokr_w2_a",),
        kinds=_LINEAR,
        formats=_PARTS,
        max_rank=parts.lokr_rank_limit,
        wants=lambda layer: parts.lokr_rank_limit(layer) > 2,  # of rank 1 alone nobody can tell the law
    ),
    Variant(
        "lora-bias",
        parts.draw_biased,
        parts.biased_direction,
        gain=("B", "bias"),
        kinds=_LINEAR,
        formats=frozenset({"peft"}),
        bias=True,
    ),
    Variant(
        "full",
        parts.draw_full,
        parts.full_direction,
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
