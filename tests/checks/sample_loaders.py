"""Loaders that are right, or wrong in exactly one way, for the tests of the checks."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from harness.files import LoraAdapter, LoraModule, match_modules, read_lora

Scale = Callable[[float, LoraModule, list[LoraModule]], float]


def only_pairs(lora: Path) -> LoraAdapter:
    adapter = read_lora(lora)
    if adapter.unused_keys or any(set(module.keys) - {"A", "B", "alpha"} for module in adapter.modules.values()):
        raise NotImplementedError(f"{lora.name}: only pairs are supported")
    return adapter


def pairs(model: torch.nn.Module, lora: Path) -> Iterator[tuple[Any, LoraModule, torch.Tensor, list[LoraModule]]]:
    adapter = only_pairs(lora)
    names, _ = match_modules(adapter, [name for name, _ in model.named_modules()])
    modules = list(adapter.modules.values())
    for name, module in adapter.modules.items():
        a, b = adapter.tensors(name)
        yield model.get_submodule(names[name]), module, b.float() @ a.float(), modules


def merge(model: torch.nn.Module, lora: Path, *, strength: float = 1.0, scale: Scale) -> None:
    for layer, module, product, modules in pairs(model, lora):
        layer.weight += (scale(strength, module, modules) * product).to(layer.weight.dtype)


def loader_with(scale: Scale) -> Callable[..., None]:
    return functools.partial(merge, scale=scale)


right = loader_with(lambda u, m, every: u * m.trained_scale)
raw_alpha = loader_with(lambda u, m, every: u * (m.trained_scale if m.alpha is None else m.alpha))
alpha_ignored = loader_with(lambda u, m, every: u)
root_of_rank = loader_with(lambda u, m, every: u * m.trained_scale * m.rank**0.5)
first_alpha = loader_with(lambda u, m, every: u * (every[0].alpha or every[0].rank) / m.rank)
truncated = loader_with(lambda u, m, every: u * (1.0 if m.alpha is None else int(m.alpha) / m.rank))
strength_ignored = loader_with(lambda u, m, every: m.trained_scale)
zero_is_one = loader_with(lambda u, m, every: (u or 1.0) * m.trained_scale)
one_per_cent = loader_with(lambda u, m, every: 1.01 * u * m.trained_scale)
only_rank_one = loader_with(lambda u, m, every: u * m.trained_scale * (1.5 if m.rank == 1 else 1))
high_rank = loader_with(lambda u, m, every: u * m.trained_scale * (0.5 if m.rank > 64 else 1))
second_module = loader_with(lambda u, m, every: (u if every.index(m) % 2 else 1.0) * m.trained_scale)
fused_rank = loader_with(lambda u, m, every: u * m.trained_scale / (3 if "qkv" in m.name else 1))


def half_precision(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        layer.weight += (strength * module.trained_scale * product).bfloat16().to(layer.weight.dtype)


def no_effect(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    pass


def skips_mlp(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        if "mlp" not in module.name:
            layer.weight += (strength * module.trained_scale * product).to(layer.weight.dtype)


def transposed(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        product = product.T if product.shape[0] == product.shape[1] else product
        layer.weight += (strength * module.trained_scale * product).to(layer.weight.dtype)


def swapped_slices(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        if "qkv" in module.name:
            q, k, v = product.chunk(3)
            product = torch.cat([k, q, v])
        layer.weight += (strength * module.trained_scale * product).to(layer.weight.dtype)


def touches_norm(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    right(model, lora, strength=strength)
    model.get_submodule("txt_norm").weight += 0.5


def rewrites_file(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    right(model, lora, strength=strength)
    file = lora / "adapter_model.safetensors" if lora.is_dir() else lora
    file.write_bytes(file.read_bytes() + b" ")


def grows_on_second_load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    times = getattr(model, "times", 0) + 1
    model.times = times  # type: ignore[assignment]
    right(model, lora, strength=strength * times)


def makes_nan(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        layer.weight += (product * strength * module.trained_scale / (module.rank != 2)).to(layer.weight.dtype)


def raises(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    raise RuntimeError("no such key: 'transformer'")


def returns_rubbish(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> int:
    return 7


def hangs(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def exits(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    raise SystemExit(0)


def dies(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    os._exit(3)


def prints(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    print("loading " * 1000)
    right(model, lora, strength=strength)


def loses_the_bias(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        layer.weight += (strength * module.trained_scale * product).to(layer.weight.dtype)
        layer.bias = None


def adds_a_constant(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    right(model, lora, strength=strength)
    for layer, *_ in pairs(model, lora):
        layer.register_forward_hook(lambda module, args, output: output + 0.01)


def changes_the_default_dtype(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    right(model, lora, strength=strength)
    torch.set_default_dtype(torch.float64)


rounded_alpha = loader_with(
    lambda u, m, every: u * (1.0 if m.alpha is None else float(torch.tensor(m.alpha).bfloat16()) / m.rank)
)
rounded_strength = loader_with(lambda u, m, every: float(torch.tensor(u).bfloat16()) * m.trained_scale)
