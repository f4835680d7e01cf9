"""Layers that are torch's own and untouched: what they compute is what they store, and nobody has to ask them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, equal, nn  # bound here: a subject may replace torch's own
from torch.nn import functional
from torch.nn.modules import module as torch_module

from harness.benches.layer import Layer, layer_of

_CLASSES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {name: getattr(functional, name) for name in ("linear", "conv1d", "conv2d", "conv3d")}
_METHODS = {
    (cls, name): getattr(cls, name, None) for cls in _CLASSES for name in ("forward", "_conv_forward", "__call__")
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def torch_is_itself() -> bool:
    """Whether a call of a layer ends in torch's own code: nothing patched, hooked for all modules, or intercepted."""
    return (
        all(getattr(functional, name) is function for name, function in _FUNCTIONS.items())
        and all(getattr(cls, name, None) is method for (cls, name), method in _METHODS.items())
        and not any(getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS)
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def is_plain(module: nn.Module, layer: Layer, like: Tensor) -> bool:
    """Whether `module` computes x @ W^T + b with its own weight and bias, in the dtype and on the device of `like`.

    It is exactly one of torch's classes, has the geometry of `layer`, no hook, no forward of its own, and tensors that
    are ordinary.
    """
    if type(module) not in _CLASSES:
        return False
    own: dict[str, Any] = vars(module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return (
        "forward" not in own
        and "_conv_forward" not in own
        and not any(own[hooks] for hooks in _HOOKS)
        and _is_shaped(module, layer)
        and own.get("padding_mode", "zeros") == "zeros"
        and _is_ordinary(weight, like)
        and (bias is None or _is_ordinary(bias, like))
        and weight is not None
        and weight.shape[0] == layer.rows
        and weight.numel() == layer.rows * layer.columns
    )


def _is_shaped(module: nn.Module, layer: Layer) -> bool:
    """Whether `layer_of` would say of a module with ordinary tensors that it is `layer`."""
    if type(module) is not nn.Linear:
        return layer_of(module) == layer
    shape, bias = (module.out_features, module.in_features), module.bias is not None
    return layer.kind == "linear" and layer.shape == shape and layer.bias == bias and not layer.codes


def _is_ordinary(x: Any, like: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and bool(x.dtype == like.dtype and x.device == like.device)


def weight_of(module: nn.Module, layer: Layer, *, bias: bool = False) -> Tensor:
    """Return the weight `[rows, columns]` of a plain layer in float64, with a column for the bias when asked."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    columns = [weight.detach().double().cpu().flatten(1)] + [offset_of(module, layer)[:, None]] * bias
    return torch.cat(columns, dim=1)


def offset_of(module: nn.Module, layer: Layer) -> Tensor:
    """Return what a plain layer answers to zeros `[rows]`, in float64."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return torch.zeros(layer.rows, dtype=torch.float64) if bias is None else bias.detach().double().cpu().clone()


@dataclass(frozen=True)
class Stored:
    """A plain layer as it was before: its own tensors, and the weight and the offset that were read of them."""

    weight: Tensor
    bias: Tensor | None
    read: Tensor
    offset: Tensor

    def weight_of(self, module: nn.Module, layer: Layer) -> Tensor:
        """Return the weight of a plain layer, what was read before where it is still the same."""
        return self.read if _same(module.weight, self.weight) else weight_of(module, layer)

    def offset_of(self, module: nn.Module, layer: Layer) -> Tensor:
        """Return what a plain layer answers to zeros, in the same way."""
        return self.offset if _same(module.bias, self.bias) else offset_of(module, layer)


def _same(x: object, stored: Tensor | None) -> bool:
    if not isinstance(x, Tensor) or stored is None:
        return x is stored
    return x.dtype == stored.dtype and x.device == stored.device and equal(x, stored)
