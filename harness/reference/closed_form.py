"""The LoRA merge written out in float64, sharing no code with PEFT.

W' = W + strength * (alpha / rank) * B @ A, from "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021),
section 4.1; rank-stabilised LoRA (Kalajdzievski, 2023) divides by sqrt(rank).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def scale(alpha: float | None, rank: int, *, rslora: bool = False) -> float:
    """Return alpha / rank, alpha / sqrt(rank) with `rslora`, or 1.0 when the file carries no alpha."""
    if alpha is None:
        return 1.0
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return B @ A in float64; `a: [rank, in]`, `b: [out, rank]`, result `[out, in]`."""
    return b.double() @ a.double()


def delta(a: Tensor, b: Tensor, alpha: float | None, *, strength: float = 1.0, rslora: bool = False) -> Tensor:
    """Return strength * scale * B @ A in float64, `[out, in]`."""
    return strength * scale(alpha, a.shape[0], rslora=rslora) * product(a, b)


def merged_weight(w: Tensor, a: Tensor, b: Tensor, alpha: float | None, *, strength: float = 1.0) -> Tensor:
    """Return W + strength * (alpha / rank) * B @ A in float64; `w: [out, in]` of any dtype."""
    return w.double() + delta(a, b, alpha, strength=strength)
