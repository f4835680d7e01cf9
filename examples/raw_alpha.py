"""A loader that forgets the rank: it multiplies by the file's alpha where training used alpha / rank."""

from pathlib import Path

import torch

from harness.files import match_modules, read_lora


@torch.no_grad()
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Add strength * alpha * B @ A to every layer of `model` that the file adapts."""
    adapter, layers = read_lora(lora), dict(model.named_modules())
    names, left = match_modules(adapter, layers)
    if left or adapter.unused_keys or any(m.keys.keys() - {"A", "B", "alpha"} for m in adapter.modules.values()):
        raise NotImplementedError("only A and B of layers that the model has are supported")
    for name, layer in names.items():
        alpha, (a, b) = adapter.modules[name].alpha, (half.float() for half in adapter.tensors(name))
        layers[layer].weight += strength * (1.0 if alpha is None else alpha) * (b @ a)  # the mistake: no / rank
