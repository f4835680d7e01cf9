"""What LoRAs add to a weight, written out in float64 and sharing no code with PEFT.

W' = W + strength * (alpha / rank) * B @ A, from "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021),
section 4.1; the factor is `harness.law.scale`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return B @ A in float64; `a: [rank, in]`, `b: [out, rank]`, result `[out, in]`."""
    return b.double() @ a.double()


def tucker_product(a: Tensor, b: Tensor, mid: Tensor) -> Tensor:
    """Return the Tucker product [out, in, *kernel] of a: [r, in, 1, 1], b: [out, r, 1, 1] and mid: [r, r, *kernel].

    delta[o, i, k] = sum_pq B[o, p] mid[p, q, k] A[q, i] (LyCORIS, "Navigating Text-To-Image
    Customization", Yeh et al., 2023, section 3).
    """
    import torch

    return torch.einsum("op,pq...,qi->oi...", b.double().flatten(1), mid.double(), a.double().flatten(1))


def dora_weight(w: Tensor, delta: Tensor, magnitude: Tensor, *, axis: int = 0) -> Tensor:
    """Return m * (W + delta) / ||W + delta||, normalised for each index of `axis`; `delta` has its scale on it.

    `magnitude` has one number per index, in any shape. PEFT: `axis` 0, the outputs; 1 for embeddings and where the
    weight is stored [in, out]. kohya's and LyCORIS' `dora_scale`: 0 when it is [out, 1, ...] (`wd_on_out`), 1 when it
    is [1, in, ...] ("DoRA", Liu et al., 2024, equation 5, whose vector is along the outputs).
    """
    import torch

    new = w.double() + delta.double()
    others = [dimension for dimension in range(new.dim()) if dimension != axis]
    norm = torch.linalg.vector_norm(new, dim=others, keepdim=True)
    result: Tensor = magnitude.double().reshape(norm.shape) * new / norm
    return result
