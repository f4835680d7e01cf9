"""The live loader `loralib`: the layers of the LoRA paper's own library, as a reference implementation.

loralib has no file format beyond a state dict without alpha: a user builds the model with `lora.Linear(..., r=r,
lora_alpha=alpha)`, loads A and B by name, and `eval()` merges. Here A, B and alpha are read by this package from a
PEFT folder, every adapted layer is replaced by loralib's, and loralib merges. It has no strength: `lora_alpha` carries
it. Convolutions are left out: `lora.Conv2d` factors the kernel another way, [r * k, in * k] and [out * k, r * k].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import LoraAdapter, match_modules, read_lora
from harness.loaders.protocol import loader

if TYPE_CHECKING:
    import torch


@loader(formats={"peft"}, strength_argument="lora_alpha")
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Replace every adapted layer of `model` by loralib's, with lora_alpha = strength * alpha, and merge with `eval()`.

    Raises:
        NotImplementedError: loralib has no layer for a module, or no scaling of this kind.
    """
    adapter = read_lora(lora)
    names, _ = match_modules(adapter, [name for name, _ in model.named_modules() if name])
    for name, path in names.items():
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, _replaced(model.get_submodule(path), adapter, name, strength))


def _replaced(layer: torch.nn.Module, adapter: LoraAdapter, name: str, strength: float) -> torch.nn.Module:
    module = adapter.modules[name]
    if module.rslora or module.variant != "lora":
        raise NotImplementedError(f"{name}: loralib has alpha / rank on B @ A only")
    alpha = strength * (module.rank if module.alpha is None else module.alpha)
    weight = next(layer.parameters())
    new: torch.nn.Module = _layer(layer, module.rank, alpha, name).to(weight.device, weight.dtype)
    a, b = adapter.tensors(name)
    new.load_state_dict({**layer.state_dict(), "lora_A": a, "lora_B": b}, strict=True)
    new.eval()  # not chained: it merges, but returns None
    return new.requires_grad_(False)


def _layer(layer: torch.nn.Module, rank: int, alpha: float, name: str) -> Any:
    import loralib  # type: ignore[import-untyped]
    import torch

    if isinstance(layer, torch.nn.Linear):
        bias = layer.bias is not None
        return loralib.Linear(layer.in_features, layer.out_features, rank, alpha, bias=bias)
    if isinstance(layer, torch.nn.Embedding):
        return loralib.Embedding(layer.num_embeddings, layer.embedding_dim, rank, alpha)
    if type(layer).__name__ == "Conv1D":  # GPT-2's: a Linear that stores its weight as [in, out]
        weight: Any = layer.weight
        rows, columns = weight.shape
        return loralib.Linear(rows, columns, rank, alpha, fan_in_fan_out=True)
    raise NotImplementedError(f"{name}: loralib has no layer for {type(layer).__name__}")
