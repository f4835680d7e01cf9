"""The factor that training put on B @ A, written once for everybody."""

from __future__ import annotations

import math


def trained_scale(alpha: float | None, rank: int, *, rslora: bool = False) -> float:
    """Return alpha / rank, alpha / sqrt(rank) with `rslora`, or 1.0 without alpha or rank.

    Hu et al., 2021, section 4.1; rank-stabilised: Kalajdzievski, 2023. A rank of 0 is that of a whole difference.
    """
    if alpha is None or rank == 0:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)
