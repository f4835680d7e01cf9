"""What the fixture loaders of other variants are made of: the modules of a file by their tensors, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import LoraModule, match_modules, read_lora
from harness.selftest.fault import wrong

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """One module of the file: its `tensors` by role in float32, and the `layer` of the model it belongs to."""

    name: str
    layer: Any
    module: LoraModule
    tensors: Mapping[str, Tensor]
    index: int

    def __getitem__(self, role: str) -> Tensor:
        """Return one tensor by its role (`A`, `magnitude`, `hada_w1_a`, ...)."""
        return self.tensors[role]

    def __contains__(self, role: str) -> bool:
        """Whether the module has a tensor of this role."""
        return role in self.tensors

    @property
    def scale(self) -> float:
        """The trained scale: alpha / rank, alpha / sqrt(rank) where the file says so, 1 without alpha or rank."""
        return self.module.trained_scale

    @property
    def square(self) -> bool:
        """Whether the stored weight has as many rows as columns."""
        shape = self.layer.weight.shape
        return bool(len(shape) == 2 and shape[0] == shape[1])

    @property
    def stored_transposed(self) -> bool:
        """Whether the layer keeps its weight as [in, out] (transformers' `Conv1D`)."""
        return type(self.layer).__name__ == "Conv1D"


Delta = Callable[[Piece], "Tensor"]


def pieces(model: torch.nn.Module, lora: Path) -> Iterator[Piece]:
    """Yield the modules of the file `lora`, each with its layer of `model`."""
    adapter = read_lora(lora)
    names, _ = match_modules(adapter, [name for name, _ in model.named_modules()])
    for index, (name, module) in enumerate(adapter.modules.items()):
        tensors = {role: adapter.file.tensor(key).float() for role, key in module.keys.items()}
        yield Piece(names[name], model.get_submodule(names[name]), module, tensors, index)


def put(parameter: Tensor, value: Tensor) -> None:
    """Write `value` into a parameter, rounded once to its dtype."""
    import torch

    with torch.no_grad():
        parameter.copy_(value)


def adds(delta: Delta) -> Callable[..., None]:
    """Return a loader that adds strength * delta(piece) to every weight of the file, in the shape it is stored in."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        for piece in pieces(model, lora):
            weight = piece.layer.weight
            put(weight, weight.float() + strength * delta(piece))

    return load


def becomes(weight: Callable[[Piece, Tensor], Tensor]) -> Callable[..., None]:
    """Return a loader that replaces every weight W of the file by weight(piece, W), for variants that add nothing."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        for piece in pieces(model, lora):
            put(piece.layer.weight, weight(piece, piece.layer.weight.float()))

    return load


def wrong_sum(*codes: str, what: str, delta: Delta, **where: Any) -> Callable[..., None]:
    """Return a loader that adds strength * delta(piece), which is wrong."""
    return wrong(*codes, what=what, **where)(adds(delta))


def wrong_weight(
    *codes: str, what: str, weight: Callable[[Piece, Tensor], Tensor], **where: Any
) -> Callable[..., None]:
    """Return a loader that makes weight(piece, W) of every weight W, which is wrong."""
    return wrong(*codes, what=what, **where)(becomes(weight))
