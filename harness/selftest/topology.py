"""Loaders between topologies: q, k and v apart in the file and merged in the model, or the reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import LoraModule, match_modules, read_lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Scale = Callable[[LoraModule], float]
_PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}


def trained(module: LoraModule) -> float:
    """Return the trained scale of a module."""
    return module.trained_scale


def into_rows(order: Sequence[int] = (0, 1, 2), scale: Scale = trained) -> Callable[..., None]:
    """Return a loader of split files into merged layers; part i goes to the rows of part `order[i]`."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        known = {name: (name, slice(None)) for name, _ in model.named_modules()}
        known |= {part: (merged, rows) for merged, part, rows in _rows(model, order)}
        for name, module, product in _products(lora, known):
            layer, rows = known[name]
            _add(model.get_submodule(layer), strength * scale(module) * product, rows)

    return load


def from_rows(order: Sequence[int] = (0, 1, 2), scale: Scale = trained) -> Callable[..., None]:
    """Return a loader of merged files into split layers; part i gets the rows of part `order[i]`."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        layers = {name for name, _ in model.named_modules()}
        split = {m: p for name in layers for m, p in _split(name)}
        for name, module, product in _products(lora, layers | set(split)):
            delta = strength * scale(module) * product
            blocks = [delta.chunk(3)[index] for index in order] if name in split else [delta]
            for part, rows in zip(split.get(name, (name,)), blocks, strict=True):
                _add(model.get_submodule(part), rows, slice(None))

    return load


def _products(lora: Path, names: Any) -> Iterator[tuple[str, LoraModule, Tensor]]:
    adapter = read_lora(lora)
    found, _ = match_modules(adapter, names)
    for name, module in adapter.modules.items():
        a, b = adapter.tensors(name)
        yield found[name], module, b.float() @ a.float()


def _rows(model: torch.nn.Module, order: Sequence[int]) -> Iterator[tuple[str, str, slice]]:
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        third = len(module.weight) // 3 if last in _PARTS else 0
        for part, place in zip(_PARTS.get(last, ()), order, strict=False):
            yield name, f"{parent}.{part}", slice(place * third, (place + 1) * third)


def _split(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    parent, _, last = name.rpartition(".")
    for merged, parts in _PARTS.items():
        if last == parts[0]:
            yield f"{parent}.{merged}", tuple(f"{parent}.{part}" for part in parts)


def _add(layer: Any, delta: Tensor, rows: slice) -> None:
    import torch

    with torch.no_grad():
        layer.weight[rows] = (layer.weight[rows].float() + delta).to(layer.weight.dtype)
