"""The trained scale: the factor on B @ A that training used."""

from __future__ import annotations

import math


def trained_scale(alpha: float | None, rank: int, *, rslora: bool = False) -> float:
    """Return alpha / rank, alpha / sqrt(rank) with `rslora`, or 1.0 without alpha or rank.

    W' = W + (alpha / rank) * B @ A is "LoRA" (Hu et al., 2021), section 4.1; rank-stabilised LoRA (Kalajdzievski, 2023)
    divides by sqrt(rank). A module has rank 0 where alpha scales nothing: whole tensors, a LoKr of two full factors.
    """
    if alpha is None or rank == 0:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)
