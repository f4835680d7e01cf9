"""Small checkpoints, LoRAs for them, and ways to merge: right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor.verify.verify import MergeReport, verify_merge
from harness.files import LoraWeights, write_lora

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32]
QKV = "blocks.0.attn.to_qkv"
Merge = Callable[[Tensor, Tensor, float], Tensor]  # base, B @ A, scale -> merged


@dataclass
class Case:
    """A small model on disk and a LoRA for two of its layers."""

    folder: Path
    base: dict[str, Tensor]
    lora: dict[str, LoraWeights]

    def merged(self, merge: Merge, scale: Callable[[LoraWeights], float], **changes: Tensor) -> Path:
        tensors = dict(self.base)
        for name, weights in self.lora.items():
            tensors[f"{name}.weight"] = merge(tensors[f"{name}.weight"], weights.b @ weights.a, scale(weights))
        save_file({**tensors, **changes}, self.folder / "merged.safetensors")
        return self.folder / "merged.safetensors"

    def verify(
        self, merged: Path, lora: str = "lora.safetensors", **options: float | bool | tuple[str, ...]
    ) -> MergeReport:
        return verify_merge(self.folder / "base.safetensors", merged, self.folder / lora, **options)  # type: ignore[arg-type]


def weights(out: int, inputs: int, rank: int, alpha: float | None, seed: int, size: float) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)
    scale = 1.0 if alpha is None else alpha / rank
    return LoraWeights(a, b * (size * 0.02 * (out * inputs) ** 0.5 / float((b @ a).norm()) / scale), alpha)


def make(
    folder: Path, dtype: torch.dtype = torch.bfloat16, size: float = 0.02, alphas: tuple[float, float] = (16, 4)
) -> Case:
    """`size` is ||scale * B @ A|| / ||W||; ranks 8 and 16."""
    torch.manual_seed(0)
    shapes = {QKV: (288, 96), "blocks.0.mlp.up": (192, 96), "blocks.1.norm_proj": (96, 96)}
    base = {f"{name}.weight": (torch.randn(*shape) * 0.02).to(dtype) for name, shape in shapes.items()}
    base["blocks.0.attn.to_qkv.bias"] = torch.randn(288).to(dtype)
    lora = {QKV: weights(288, 96, 8, alphas[0], 1, size), "blocks.0.mlp.up": weights(192, 96, 16, alphas[1], 2, size)}
    save_file(base, folder / "base.safetensors")
    write_lora(folder / "lora.safetensors", "diffsynth", lora)
    return Case(folder, base, lora)


def trained(weights: LoraWeights) -> float:
    return weights.alpha / weights.rank if weights.alpha is not None else 1.0


def rounded_once(base: Tensor, product: Tensor, scale: float) -> Tensor:
    return (base.float() + scale * product).to(base.dtype)


def delta_rounded_too(base: Tensor, product: Tensor, scale: float) -> Tensor:
    delta = (scale * product).to(torch.bfloat16 if base.dtype.itemsize == 1 else base.dtype)
    return (base.float() + delta.float()).to(base.dtype)


def twice(base: Tensor, product: Tensor, scale: float) -> Tensor:
    return rounded_once(rounded_once(base, product, scale), product, scale)
