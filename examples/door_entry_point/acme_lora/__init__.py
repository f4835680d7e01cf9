"""The loader of the package `acme`: every kohya file, merged into the model's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from harness import loader

PARTS = {"lora_down.weight", "lora_up.weight", "alpha"}


@loader(formats={"kohya"}, strength_argument="weight")
@torch.no_grad()
def load(model: torch.nn.Module, lora: Path, weight: float = 1.0) -> None:
    """Add weight * alpha / rank * B @ A to every layer that the file adapts."""
    tensors = load_file(lora)
    layers = {"lora_unet_" + name.replace(".", "_"): layer for name, layer in model.named_modules()}
    unknown = [key for key in tensors if key.partition(".")[0] not in layers or key.partition(".")[2] not in PARTS]
    if unknown:
        raise ValueError(f"{lora.name}: no layer of this model takes {unknown[0]!r}; {len(unknown)} such keys")
    for name in {key.partition(".")[0] for key in tensors}:
        down, up = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
        rank = down.shape[0]
        alpha = float(tensors.get(f"{name}.alpha", rank))  # a file without alpha was trained at scale 1
        merged = layers[name].weight.double() + weight * alpha / rank * (up @ down)  # rounded once, at the end
        layers[name].weight.copy_(merged)
