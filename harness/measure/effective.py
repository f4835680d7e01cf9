"""Effective weights: what a module really computes, read by sending the identity through its forward.

Merged weights, hooks, wrappers, parametrizations, patched forwards and returned copies are all measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MissingModuleError(LookupError):
    """The loaded model has no module at a path the base model had."""


def effective_weights(model: nn.Module, layers: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return the effective weight `[out, in]` of each layer in its own dtype, in float64.

    `layers` maps a path of the base model to (out_features, in_features); a model that came back inside a wrapper
    is searched by the end of the path.

    Raises:
        MissingModuleError: a path is gone.
        ValueError: a module answers with another shape than `[in, out]`.
    """
    modules, like = dict(model.named_modules()), _numbers_of(model)
    return {name: effective_weight(_find(modules, name), shape, like) for name, shape in layers.items()}


def weights_while_running(
    model: nn.Module, layers: Mapping[str, tuple[int, int]], run: Callable[[nn.Module], object]
) -> dict[str, Tensor]:
    """Return the effective weights as they are inside the model's own forward, which `run` calls once.

    Some loaders put the LoRA in when the model begins to run and take it out at the end (functional calls, samplers
    that patch), others merge at the first run: a layer asked on its own then answers as if nothing were loaded.
    """
    modules, like = dict(model.named_modules()), _numbers_of(model)
    found: dict[str, Tensor] = {}

    def read(name: str, module: nn.Module) -> None:
        if name not in found:
            found[name] = torch.empty(0)  # the probe calls the module again
            found[name] = effective_weight(module, layers[name], like)

    handles = [
        _find(modules, name).register_forward_pre_hook(lambda module, args, name=name: read(name, module))
        for name in layers
    ]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    rest = {name: shape for name, shape in layers.items() if name not in found}
    found |= effective_weights(model, rest)
    return {name: found[name] for name in layers}


@torch.no_grad()
def effective_weight(module: nn.Module, shape: tuple[int, int], like: Tensor | None = None) -> Tensor:
    """Return W `[out, in]` in float64 with module(x) = x @ W^T + constant, from module(identity) - module(0).

    The inputs have the dtype and device of `like`, by default those of the module's own numbers.
    """
    rows, columns = shape
    like = _numbers_of(module) if like is None else like
    probe = torch.eye(columns, device=like.device, dtype=like.dtype)
    with _without_bias(module):
        answer = module(torch.cat([probe, torch.zeros_like(probe[:1])]))
    if not isinstance(answer, Tensor) or answer.shape != (columns + 1, rows):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"module answers {got} to {columns + 1} inputs, but should be {(columns + 1, rows)}")
    answer = answer.double().cpu()
    return (answer[:-1] - answer[-1]).T


def _numbers_of(module: nn.Module) -> Tensor:
    """Return the first floating tensor: activations have its dtype and device."""
    return next((x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()), torch.empty(0))


def _find(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name in modules:
        return modules[name]
    matches = [found for found in modules if found.endswith("." + name)]
    if len(matches) != 1:
        raise MissingModuleError(name)
    return modules[matches[0]]


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    """Zero every bias meanwhile: adding one in half precision would round the weight that is being read."""
    named = (*module.named_parameters(), *module.named_buffers())
    biases = [x for name, x in named if name.rpartition(".")[2] == "bias"]
    saved = [bias.detach().clone() for bias in biases]
    try:
        for bias in biases:
            bias.data.zero_()
        yield
    finally:
        for bias, value in zip(biases, saved, strict=True):
            bias.data.copy_(value)
