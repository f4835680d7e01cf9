"""Layers that are torch's own and untouched: their answers are known without asking, which is most of a check's work.

A loader that merges leaves such layers behind; asking each of them for its weight would only multiply it by 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from harness.benches.layer import Layer, layer_of

_CLASSES = (nn.Linear, nn.Conv2d)
_FUNCTIONS = {"linear": functional.linear, "conv2d": functional.conv2d}
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
    if not isinstance(module, _CLASSES):
        return False
    return (
        type(module) in _CLASSES
        and "forward" not in vars(module)
        and "_conv_forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and layer_of(module) == layer
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and all(_is_ordinary(x, like) for x in (module.weight, module.bias) if x is not None)
        and module.weight.shape[0] == layer.rows
        and module.weight.numel() == layer.rows * layer.columns
    )


def _is_ordinary(x: Tensor, like: Tensor) -> bool:
    ordinary = type(x) in (Tensor, nn.Parameter)
    return ordinary and x.dtype == like.dtype and x.device == like.device


def weight_of(module: nn.Module, layer: Layer, *, bias: bool = False) -> Tensor:
    """Return the weight `[rows, columns]` of a plain layer in float64, with a column for the bias when asked."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    columns = [weight.detach().double().cpu().flatten(1)] + [offset_of(module, layer)[:, None]] * bias
    return torch.cat(columns, dim=1)


def offset_of(module: nn.Module, layer: Layer) -> Tensor:
    """Return what a plain layer answers to zeros `[rows]`, in float64."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return torch.zeros(layer.rows, dtype=torch.float64) if bias is None else bias.detach().double().cpu().clone()
