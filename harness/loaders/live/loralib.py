"""The live loader `loralib`: the layers of the LoRA paper's own library, as a reference implementation.

loralib has no file format beyond a state dict without alpha: a user builds the model with `lora.Linear(..., r=r,
lora_alpha=alpha)`, loads A and B by name, and `eval()` merges. Here A, B and alpha are read by this package from a
PEFT folder, every adapted layer is replaced by loralib's, and loralib merges. It has no strength: `lora_alpha` carries
it. Two of its layers keep A and B in another shape, to which they are brought without any arithmetic:

- `Conv2d` has A: [rank * k, in * k] and B: [out * k, rank * k], whose product it views as the kernel [out, in, k, k];
  that of A and of the Kronecker product of B with the k x k identity is the kernel of PEFT's pair.
- `MergedLinear`, for layers that stack q, k and v, has an A for each of them; one A for all three is repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader
from harness.loaders.protocol import EVERY_BENCH

if TYPE_CHECKING:
    import torch

    from harness.files import LoraAdapter

VARIANTS = ("lora", "conv", "embedding", "rslora", "dora", "loha", "lokr", "lora-bias")
UNSUPPORTED: dict[tuple[str, ...], str] = {
    ("rslora",): "its scaling is lora_alpha / r",
    **{(name,): "its layers add B @ A and nothing else" for name in ("dora", "loha", "lokr", "lora-bias")},
}
QKV = ("to_qkv", "add_qkv_proj", "c_attn")


@loader(
    formats={"peft"}, benches=EVERY_BENCH, variants=VARIANTS, unsupported=UNSUPPORTED, strength_argument="lora_alpha"
)
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Replace every adapted layer of `model` by loralib's, with lora_alpha = strength * alpha, and merge with `eval()`.

    Raises:
        NotImplementedError: loralib has no layer for a module, or no scaling of this kind.
    """
    from harness.files import match_modules, read_lora

    adapter = read_lora(lora)
    names, _ = match_modules(adapter, [name for name, _ in model.named_modules() if name])
    for name, path in names.items():
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, _replaced(model, adapter, name, path, strength))


def _replaced(model: torch.nn.Module, adapter: LoraAdapter, name: str, path: str, strength: float) -> torch.nn.Module:
    module, layer = adapter.modules[name], model.get_submodule(path)
    if module.rslora or module.variant not in ("lora", "conv", "embedding"):
        raise NotImplementedError(f"{name}: loralib has alpha / rank on B @ A only")
    alpha = strength * (module.rank if module.alpha is None else module.alpha)
    weight = next(layer.parameters())
    new = _layer(layer, module.rank, alpha, path).to(weight.device, weight.dtype)
    base = new.conv if hasattr(new, "conv") else new
    base.load_state_dict(layer.state_dict(), strict=False)
    pair = _pair(new, *adapter.tensors(name))
    new.load_state_dict({**new.state_dict(), **pair}, strict=True)
    new.eval()  # not chained: it merges, but returns None
    kept: torch.nn.Module = new.requires_grad_(False)
    return kept


def _layer(layer: torch.nn.Module, rank: int, alpha: float, path: str) -> Any:
    import loralib  # type: ignore[import-untyped]
    import torch

    if isinstance(layer, torch.nn.Linear):
        return _linear(path, layer.in_features, layer.out_features, rank, alpha, bias=layer.bias is not None)
    if isinstance(layer, torch.nn.Embedding):
        return loralib.Embedding(layer.num_embeddings, layer.embedding_dim, rank, alpha)
    if isinstance(layer, torch.nn.Conv2d):
        how = {"stride": layer.stride, "padding": layer.padding, "bias": layer.bias is not None}
        return loralib.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size[0], rank, alpha, **how)
    if type(layer).__name__ == "Conv1D":  # GPT-2's: a Linear that stores its weight as [in, out]
        weight: Any = layer.weight
        columns, rows = weight.shape
        return _linear(path, columns, rows, rank, alpha, fan_in_fan_out=True)
    raise NotImplementedError(f"{path}: loralib has no layer for {type(layer).__name__}")


def _linear(path: str, columns: int, rows: int, rank: int, alpha: float, **how: bool) -> Any:
    import loralib

    if path.endswith(QKV):
        return loralib.MergedLinear(columns, rows, rank, alpha, enable_lora=[True] * 3, **how)
    return loralib.Linear(columns, rows, rank, alpha, **how)


def _pair(new: Any, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return A: [rank, in] (of a convolution [rank, in, k, k]) and B: [out, rank] as the layer `new` keeps them."""
    import torch

    if hasattr(new, "conv"):
        return {
            "lora_A": a.reshape(new.lora_A.shape),
            "lora_B": torch.kron(b.flatten(1), torch.eye(new.conv.kernel_size[0]).to(b)),
        }
    return {"lora_A": a.repeat(new.lora_A.shape[0] // a.shape[0], 1), "lora_B": b}


LIVE = (LiveLoader("loralib", load, ("loralib",), imports=("loralib",), any_model=True),)
