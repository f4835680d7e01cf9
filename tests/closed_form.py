"""The LoRA merge and the products of its variants written out in float64, sharing no code with PEFT or LyCORIS.

What a loader is judged by (`harness.law.scale`, `harness.variants`, `harness.doctor.verify`) is held against this, and
this against sums written out by hand, PEFT and LyCORIS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.law.scale import trained_scale as scale
from harness.reference.closed_form import dora_weight, product, tucker_product

__all__ = [
    "bias_sum",
    "conv_product",
    "delta",
    "dora_weight",
    "embedding_product",
    "full_weight",
    "loha_product",
    "lokr_product",
    "merged_weight",
    "product",
    "scale",
    "transposed_product",
    "tucker_product",
]


def delta(a: Tensor, b: Tensor, alpha: float | None, *, strength: float = 1.0, rslora: bool = False) -> Tensor:
    """Return strength * scale * B @ A in float64, `[out, in]`."""
    return strength * scale(alpha, a.shape[0], rslora=rslora) * product(a, b)


def merged_weight(w: Tensor, a: Tensor, b: Tensor, alpha: float | None, *, strength: float = 1.0) -> Tensor:
    """Return W + strength * (alpha / rank) * B @ A in float64; `w: [out, in]` of any dtype."""
    return w.double() + delta(a, b, alpha, strength=strength)


def conv_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the LoCon product [out, in, *kernel] of a: [r, in, *kernel] and b: [out, r, 1, ...].

    delta[o, i, k] = sum_r B[o, r] A[r, i, k]: the convolution of A's output by a 1x1 kernel (LyCORIS, "Navigating
    Text-To-Image Customization", Yeh et al., 2023, section 3; PEFT `lora.Conv2d`).
    """
    return torch.einsum("or,ri...->oi...", b.double().flatten(1), a.double())


def _core(t: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """Return sum_pq t[p, q, k] wa[p, o] wb[q, i]: LyCORIS' Tucker core, whose `wa` is [r, out]."""
    return torch.einsum("pq...,po,qi->oi...", t.double(), wa.double(), wb.double())


def loha_product(first: Sequence[Tensor], second: Sequence[Tensor], shape: Sequence[int] | None = None) -> Tensor:
    """Return (w1_a w1_b) * (w2_a w2_b), elementwise, reshaped to the weight's `shape` when it is given.

    `first` and `second` are (a: [out, r], b: [r, in]) or, with a Tucker core, (a: [r, out], b: [r, in],
    t: [r, r, *kernel]) ("FedPara", Hyeon-Woo et al., 2022, proposition 1; PEFT and LyCORIS `loha`).
    """
    one, two = (
        _core(half[2], half[0], half[1]) if len(half) == 3 else half[0].double() @ half[1].double()
        for half in (first, second)
    )
    return (one * two).reshape(shape or one.shape)


def lokr_product(first: Sequence[Tensor], second: Sequence[Tensor], shape: Sequence[int] | None = None) -> Tensor:
    """Return the Kronecker product w1 ⊗ w2, reshaped to the weight's `shape` when it is given.

    Either factor is (full,) or a low-rank (a: [rows, r], b: [r, columns]); `second` may be (a: [r, rows],
    b: [r, columns], t: [r, r, *kernel]). delta[ab, cd, k] = w1[a, c] w2[b, d, k] (Yeh et al., 2023, section 3; PEFT and
    LyCORIS `lokr`). LyCORIS has scale 1 when both factors are full, PEFT alpha / r of its configuration.
    """
    one, two = _factor(first), _factor(second)
    product = torch.einsum("ac,bd...->abcd...", one, two)
    flat = product.reshape(one.shape[0] * two.shape[0], one.shape[1] * two.shape[1], *two.shape[2:])
    return flat.reshape(shape or flat.shape)


def _factor(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 3:
        return _core(parts[2], parts[0], parts[1])
    return parts[0].double() @ parts[1].double() if len(parts) == 2 else parts[0].double()


def embedding_product(a: Tensor, b: Tensor) -> Tensor:
    """Return (B A)^T: [tokens, width] of a: [r, tokens] and b: [width, r], for a table of one row per token.

    PEFT `lora.Embedding` (fan_in_fan_out holds for every embedding).
    """
    return (b.double() @ a.double()).t()


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return (B A)^T: [in, out] for layers that store their weight so, such as GPT-2's Conv1D (`fan_in_fan_out`)."""
    return embedding_product(a, b)


def bias_sum(bias: Tensor, lora_bias: Tensor, factor: float) -> Tensor:
    """Return bias + factor * lora_bias: [out]; `factor` is strength * alpha / rank (PEFT `lora_bias`).

    ComfyUI's `.diff_b` is added with the strength alone.
    """
    return bias.double() + factor * lora_bias.double()


def full_weight(w: Tensor, diff: Tensor, *, strength: float = 1.0) -> Tensor:
    """Return W + strength * diff: whole differences of weights, biases and norms have no alpha (LyCORIS `full`)."""
    return w.double() + strength * diff.double().reshape(w.shape)
