"""The layers that a LoRA may change: each weight seen as a matrix, under the names that the file has for it."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from harness.benches.codes import codes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["linear", "transposed", "conv", "embedding", "experts"]
Rows = tuple[tuple[str, slice], ...]
"""Rows of the model's layers, stacked in this order."""


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is the matrix `[rows, columns]`: outputs by inputs.

    A convolution of one, two or three dimensions has one column per input channel and kernel place,
    `[out, in * kh * kw]`; an embedding one column per token; `transposed` is a linear layer that stores its weight as
    [in, out] (transformers' `Conv1D`). `experts` are the matrices of a parameter of three dimensions, one below the
    other, `turned` where each is stored as [in, out]; its path is the parameter's. `bias` says whether it has one.
    `computed` says that it is made of other parameters whenever it is asked for, as under weight norm. `codes` is what
    a quantised weight is rounded to, `blur` the share of an answer that such a layer loses of dense input, where it
    rounds that too.
    """

    kind: Kind
    rows: int
    columns: int
    bias: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    codes: str = ""
    blur: float = 0.0
    experts: int = 1
    turned: bool = False
    computed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def channels(self) -> int:
        """The number of input channels (of a linear layer: of input features)."""
        return self.columns // math.prod(self.kernel)


def layer_of(module: torch.nn.Module) -> Layer | None:
    """Return what `module` is, or None when no LoRA is trained on such a layer."""
    found = _layer_of(module)
    return replace(found, computed=True) if found and "weight" not in module._parameters else found


def _layer_of(module: torch.nn.Module) -> Layer | None:
    from torch import Tensor, nn

    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_complex():
        return None
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Layer("linear", module.out_features, module.in_features, bias, codes=codes_of(module))
    if isinstance(module, nn.Embedding):
        positions = len(inspect.signature(type(module).forward).parameters) != 2  # computed from a mask
        if positions or module.max_norm is not None:  # who asks such a layer changes it
            return None
        return Layer("embedding", module.embedding_dim, module.num_embeddings)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
        columns = module.in_channels * math.prod(module.kernel_size)
        geometry = module.kernel_size, module.stride, _padding(module), module.dilation
        return Layer("conv", module.out_channels, columns, bias, *geometry)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:  # transformers'
        columns, rows = module.weight.shape  # type: ignore[misc]  # [in, out]
        return Layer("transposed", rows, columns, bias)
    return None


def experts_of(model: torch.nn.Module, ends: Sequence[str]) -> dict[str, Layer]:
    """Return the stacked experts of a model whose paths end so, by path; `is_transposed` says how a module stores them.

    That is what transformers' models have, and what PEFT reads.
    """
    found = {}
    for path, weight in model.named_parameters():
        if weight.dim() == 3 and any(path == end or path.endswith(f".{end}") for end in ends):
            number, first, second = weight.shape
            turned = bool(getattr(model.get_submodule(path.rpartition(".")[0]), "is_transposed", False))
            rows, columns = (second, first) if turned else (first, second)
            found[path] = Layer("experts", number * rows, columns, experts=number, turned=turned)
    return found


def parameter_of(model: torch.nn.Module, path: str, layer: Layer) -> Any:
    """Return the parameter that the weight of a layer is, None where it has none."""
    return model.get_parameter(path) if layer.kind == "experts" else getattr(model.get_submodule(path), "weight", None)


def _padding(module: torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d) -> tuple[int, ...]:
    """Return how many zeros stand before the first pixel, also where the layer says it in a word."""
    if not isinstance(module.padding, str):
        return module.padding
    if module.padding == "valid":
        return tuple(0 for _ in module.kernel_size)
    return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))


@dataclass(frozen=True, eq=False)
class View:
    """The layers of a model as a LoRA file names them: its own, or q, k and v taken apart or put together.

    A LoRA trained on one topology can be right on the other: what it adds to `to_q` belongs in the first rows of
    `to_qkv`. A view gathers the rows of the model's layers under the names of the file, so everything is measured
    there. Those a LoRA may target are `lora_layers`, and `parts` says of those that stack several projections how many
    rows each has. `made_of` says where the rows of a layer are in the model, for the layers that are not the model's
    own or have another name there.
    """

    name: str
    layers: Mapping[str, Layer]
    lora_layers: tuple[str, ...]
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    made_of: Mapping[str, Rows] = field(default_factory=dict)

    @cached_property
    def hosts(self) -> Mapping[str, str]:
        """The model's layer of each layer that is some of its rows, as another one is the rest."""
        first = {name: rows[0][0] for name, rows in self.made_of.items() if len(rows) == 1}
        number = Counter(first.values())
        return {name: host for name, host in first.items() if number[host] > 1}

    def slices(self, layer: str) -> tuple[slice, ...]:
        """The row ranges of `layer` that hold separate projections; one range for an ordinary layer."""
        if layer in self.parts:
            return _stacked(self.parts[layer])
        rows = self.made_of.get(layer)
        return _stacked([_length(part) for _, part in rows] if rows else [self.layers[layer].rows])

    def gather(
        self, weights: Mapping[str, Tensor], before: Mapping[str, Tensor] = {}, gathered: Mapping[str, Tensor] = {}
    ) -> dict[str, Tensor]:
        """Return the weights of this view from those of the model's layers.

        Where these are the very tensors of `before`, those are taken that were `gathered` from it.
        """
        import torch

        def made(name: str, rows: Rows) -> Tensor:
            if name in gathered and all(weights[layer] is before[layer] for layer, _ in rows):
                return gathered[name]
            return torch.cat([weights[layer][part] for layer, part in rows])

        own = {name: made(name, rows) for name, rows in self.made_of.items()}
        return {name: own[name] if name in own else weights[name] for name in self.layers}


def regroup(view: View, made_of: Mapping[str, Rows]) -> View:
    """Return `view` with the layers of `made_of` in the place of those they are made of."""
    gone = {layer for parts in made_of.values() for layer, _ in parts}
    made = {name: _joined(view, parts) for name, parts in made_of.items()}
    kept = {name: layer for name, layer in view.layers.items() if name not in gone}
    targets = tuple(name for name in view.lora_layers if name not in gone)
    parts = {name: rows for name, rows in view.parts.items() if name not in gone}
    return replace(view, layers={**made, **kept}, lora_layers=(*made, *targets), parts=parts, made_of=dict(made_of))


def renamed(view: View, name_of: Callable[[str], str]) -> View:
    """Return `view` with its layers under other names, which say where in the model they are."""
    names = {layer: name_of(layer) for layer in view.layers}
    own = {layer: ((layer, slice(0, view.layers[layer].rows)),) for layer, name in names.items() if name != layer}
    return replace(
        view,
        layers={names[layer]: what for layer, what in view.layers.items()},
        lora_layers=tuple(names[layer] for layer in view.lora_layers),
        parts={names[layer]: rows for layer, rows in view.parts.items()},
        made_of={names[layer]: rows for layer, rows in {**own, **view.made_of}.items()},
    )


def _joined(view: View, parts: Rows) -> Layer:
    return replace(view.layers[parts[0][0]], rows=sum(_length(rows) for _, rows in parts))


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _stacked(lengths: Sequence[int]) -> tuple[slice, ...]:
    ends = list(accumulate(lengths))
    return tuple(slice(end - length, end) for length, end in zip(lengths, ends, strict=True))
