"""What the fixture loaders are made of: the modules of a LoRA file beside the layers of the model they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import LoraAdapter, LoraModule, match_modules, read_lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Factor = Callable[["Part", float], float]
Change = Callable[["Part", "Tensor", float], "Tensor"]
Delta = Callable[["Part"], "Tensor"]
Weight = Callable[["Part", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Part:
    """One module of the file: its `tensors` by role as stored, the `layer` it belongs to, its place in the file.

    `part[role]` is a tensor in float32. `file` lists every module in the order of the keys; `alphas` and `ranks` are
    theirs.
    """

    name: str
    layer: Any
    module: LoraModule
    tensors: Mapping[str, Tensor]
    index: int
    file: tuple[LoraModule, ...]

    def __getitem__(self, role: str) -> Tensor:
        """Return one tensor in float32 by its role (`A`, `magnitude`, `hada_w1_a`, ...)."""
        return self.tensors[role].float()

    @property
    def a(self) -> Tensor:
        """A: [rank, in] in the dtype of the file."""
        return self.tensors["A"]

    @property
    def b(self) -> Tensor:
        """B: [out, rank] in the dtype of the file."""
        return self.tensors["B"]

    @property
    def rank(self) -> int:
        """The rank, from the tensor."""
        return int(self.a.shape[0])

    @property
    def alpha(self) -> float | None:
        """Alpha as the file says it."""
        return self.module.alpha

    @property
    def alpha_or_rank(self) -> float:
        """Alpha, or the rank where the file carries none, so that dividing by the rank is always right."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The trained scale: alpha / rank, alpha / sqrt(rank) where the file says so, 1 without alpha or rank."""
        return self.module.trained_scale

    @property
    def square(self) -> bool:
        """Whether the stored weight is a matrix with as many rows as columns."""
        shape = self.layer.weight.shape
        return bool(len(shape) == 2 and shape[0] == shape[1])

    @property
    def stored_transposed(self) -> bool:
        """Whether the layer keeps its weight as [in, out] (transformers' `Conv1D`)."""
        return type(self.layer).__name__ == "Conv1D"

    @property
    def fused(self) -> bool:
        """Whether the layer stacks q, k and v."""
        return "qkv" in self.name

    @property
    def product(self) -> Tensor:
        """B @ A in float32."""
        return self["B"] @ self["A"]

    @property
    def alphas(self) -> list[float]:
        """Alpha of every module of the file; the rank where the file carries none."""
        return [float(m.rank) if m.alpha is None else m.alpha for m in self.file]

    @property
    def ranks(self) -> list[int]:
        """The rank of every module of the file."""
        return [m.rank for m in self.file]


def parts(model: torch.nn.Module, lora: Path, *, every: bool = False) -> Iterator[Part]:
    """Yield the modules of the file `lora` in the order of its keys, each with its layer of `model`.

    Raises:
        NotImplementedError: the file has more than pairs, unless `every` variant is handled, or keys nobody knows.
        KeyError: the model lacks a module.
    """
    adapter = read_lora(lora)
    if not every:
        _only_pairs(adapter)
    names, _ = match_modules(adapter, [name for name, _ in model.named_modules()])
    file = tuple(adapter.modules.values())
    for index, (name, module) in enumerate(adapter.modules.items()):
        tensors = {role: adapter.part(name, role) for role in module.keys}
        yield Part(names[name], model.get_submodule(names[name]), module, tensors, index, file)


def _only_pairs(adapter: LoraAdapter) -> None:
    for name, module in adapter.modules.items():
        if other := set(module.keys) - {"A", "B", "alpha"}:
            raise NotImplementedError(f"{name} has {', '.join(sorted(other))}: only pairs are supported")
    if adapter.unused_keys:
        raise NotImplementedError(f"{adapter.unused_keys[0]} is no key that is supported")


def put(parameter: Tensor, value: Tensor) -> None:
    """Write `value` into a parameter, rounded once to its dtype."""
    import torch

    with torch.no_grad():
        parameter.copy_(value)


def add(layer: Any, delta: Tensor) -> None:
    """Add `delta` to the layer's weight in place: computed in float32, rounded once to its dtype."""
    put(layer.weight, layer.weight.float() + delta.float())


def merge(model: torch.nn.Module, lora: Path, strength: float, factor: Factor) -> None:
    """Add factor(part, strength) * B @ A to every layer of the file."""
    for part in parts(model, lora):
        add(part.layer, factor(part, strength) * part.product)


def right(part: Part, strength: float) -> float:
    """Return the right factor: strength * alpha / rank."""
    return strength * part.scale


def adds(delta: Delta, *, every: bool = True) -> Callable[..., None]:
    """Return a loader that adds strength * delta(part) to every weight, in the shape it is stored in.

    Unless `every` variant is handled it refuses what has more than pairs.
    """
    return _loader(lambda part, strength: add(part.layer, strength * delta(part)), every=every)


def becomes(weight: Weight) -> Callable[..., None]:
    """Return a loader that moves every weight W by strength * (weight(part, W) - W), for variants that add nothing."""

    def apply(part: Part, strength: float) -> None:
        base = part.layer.weight.float()
        put(part.layer.weight, base.double() + strength * (weight(part, base).double() - base.double()))

    return _loader(apply, every=True)


def scaled_by(factor: Factor) -> Callable[..., None]:
    """Return a loader that adds factor(part, strength) * B @ A to every layer."""
    return _loader(lambda part, strength: add(part.layer, factor(part, strength) * part.product))


def changed_by(change: Change) -> Callable[..., None]:
    """Return a loader that adds change(part, right delta in float32, strength) to every layer."""
    return _loader(lambda part, strength: add(part.layer, change(part, right(part, strength) * part.product, strength)))


def _loader(apply: Callable[[Part, float], None], *, every: bool = False) -> Callable[..., None]:
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        for part in parts(model, lora, every=every):
            apply(part, strength)

    return load
