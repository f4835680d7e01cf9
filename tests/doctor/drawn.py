"""Seeded matrices and the files of a rebuilt report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
BF16 = torch.bfloat16


class Drawn:
    """Seeded matrices, and the files of a report."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generator = torch.Generator().manual_seed(7)

    def weight(self, *shape: int, std: float = 0.02, dtype: torch.dtype = BF16) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * std).to(dtype)

    def pair(self, out: int, inputs: int, rank: int, std: float = 0.02) -> tuple[Tensor, Tensor]:
        return self.weight(rank, inputs, std=inputs**-0.5), self.weight(out, rank, std=std)

    def save(self, name: str, tensors: Tensors) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        return path

    def peft(self, tensors: Tensors, **config: Any) -> Path:
        self.save("lora/adapter_model.safetensors", tensors)
        fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **config}
        (self.folder / "lora" / "adapter_config.json").write_text(json.dumps(fields))
        return self.folder / "lora"


def plus(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Merge as PEFT does: in float32, rounded once."""
    return (weight.float() + scale * b.float() @ a.float()).to(weight.dtype)
