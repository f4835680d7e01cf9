"""Split layers stacked into a merged one: A: [n * r, in] and a block-diagonal B: [out, n * r].

kohya's `split_qkv` saves FLUX's q, k, v (and, in single blocks, the MLP) this way and leaves alpha as it was, so the
trained scale is alpha / r of one block, while a reader that divides by the stored rank gets 1 / n of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]

_FUSED = ((re.compile(r"(^|[._])qkv$"), (1, 1, 1)), (re.compile(r"single_blocks[._]\d+[._]linear1$"), (1, 1, 1, 4)))


def fused_heights(name: str, out_features: int) -> tuple[int, ...] | None:
    """Return how many rows each layer has inside the merged layer `name`, or None when it is no such layer.

    `….qkv` has three equal parts; `linear1` of FLUX's single blocks has q, k, v and an MLP four times as high.
    """
    shares = next((shares for pattern, shares in _FUSED if pattern.search(name)), ())
    unit, rest = divmod(out_features, sum(shares) or 1)
    return tuple(share * unit for share in shares) if shares and unit and not rest else None


def split_blocks(a: Tensor, b: Tensor, heights: Sequence[int]) -> tuple[Pair, ...] | None:
    """Return (A_i: [r, in], B_i: [heights[i], r]) when B is exactly block-diagonal, else None.

    All blocks have the same rank. A block that is zero everywhere is a block, but at least two must not be zero,
    because otherwise nothing tells the layout.
    """
    count = len(heights)
    if a.shape[0] % count or sum(heights) != b.shape[0]:
        return None
    rank = a.shape[0] // count
    starts = accumulate(heights, initial=0)
    spans = [
        (slice(start, start + height), slice(i * rank, (i + 1) * rank))
        for i, (start, height) in enumerate(zip(starts, heights, strict=False))
    ]
    parts = tuple((a[columns], b[rows, columns]) for rows, columns in spans)
    inside = sum(int(part.count_nonzero()) for _, part in parts)
    used = sum(bool(part.any()) for _, part in parts)
    return parts if inside == int(b.count_nonzero()) and used > 1 else None


def stack_blocks(parts: Sequence[Pair]) -> Pair:
    """Return the merged (A: [sum of r, in], B: [sum of out, sum of r]) of layers side by side; ranks may differ."""
    import torch

    blocks: Any = torch.block_diag
    return torch.cat([a for a, _ in parts]), blocks(*(b for _, b in parts))
