"""What the fixture loaders are made of: the modules of a LoRA file beside the layers of the model they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import LoraModule, match_modules, read_lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Factor = Callable[["Part", float], float]
Change = Callable[["Part", "Tensor", float], "Tensor"]


@dataclass(frozen=True)
class Part:
    """One module of the file: `a: [rank, in]`, `b: [out, rank]`, the `layer` it belongs to, its place in the file.

    `file` lists every module of the file in the order of its keys; `alphas` and `ranks` are theirs.
    """

    name: str
    layer: Any
    module: LoraModule
    a: Tensor
    b: Tensor
    index: int
    file: tuple[LoraModule, ...]

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
        """The trained scale: alpha / rank, or 1 without alpha."""
        return self.module.trained_scale

    @property
    def square(self) -> bool:
        """Whether the layer has as many outputs as inputs."""
        return bool(self.a.shape[1] == self.b.shape[0])

    @property
    def fused(self) -> bool:
        """Whether the layer stacks q, k and v."""
        return "qkv" in self.name

    @property
    def product(self) -> Tensor:
        """B @ A in float32."""
        return self.b.float() @ self.a.float()

    @property
    def alphas(self) -> list[float]:
        """Alpha of every module of the file; the rank where the file carries none."""
        return [float(m.rank) if m.alpha is None else m.alpha for m in self.file]

    @property
    def ranks(self) -> list[int]:
        """The rank of every module of the file."""
        return [m.rank for m in self.file]


def parts(model: torch.nn.Module, lora: Path) -> Iterator[Part]:
    """Yield the modules of the file `lora` in the order of its keys, each with its layer of `model`."""
    adapter = read_lora(lora)
    names, _ = match_modules(adapter, [name for name, _ in model.named_modules()])
    file = tuple(adapter.modules.values())
    for index, (name, module) in enumerate(adapter.modules.items()):
        a, b = adapter.tensors(name)
        yield Part(names[name], model.get_submodule(names[name]), module, a, b, index, file)


def add(layer: Any, delta: Tensor) -> None:
    """Add `delta: [out, in]` to the layer's weight in place: computed in float32, rounded once to its dtype."""
    import torch

    with torch.no_grad():
        layer.weight.copy_(layer.weight.float() + delta.float())


def merge(model: torch.nn.Module, lora: Path, strength: float, factor: Factor) -> None:
    """Add factor(part, strength) * B @ A to every layer of the file."""
    for part in parts(model, lora):
        add(part.layer, factor(part, strength) * part.product)


def scaled_by(factor: Factor) -> Callable[..., None]:
    """Return a loader that adds factor(part, strength) * B @ A to every layer."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        merge(model, lora, strength, factor)

    return load


def changed_by(change: Change) -> Callable[..., None]:
    """Return a loader that adds change(part, right delta in float32, strength) to every layer."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        for part in parts(model, lora):
            add(part.layer, change(part, strength * part.scale * part.product, strength))

    return load


def right(part: Part, strength: float) -> float:
    """Return the right factor: strength * alpha / rank."""
    return strength * part.scale
