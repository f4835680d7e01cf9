"""Effective weights: what a module really computes, read by sending the identity through its forward.

Merged weights, hooks, wrappers, parametrizations, patched forwards and returned copies are all measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from harness.benches.bench import first_number
from harness.benches.layer import Layer
from harness.measure.plain import Stored, is_plain, offset_of, torch_is_itself, weight_of

DENSE = 6  # inputs: a batch, and two alone
_WITHOUT_INPUT = ("embedding", "experts")  # of numbers


class MissingModuleError(LookupError):
    """The loaded model has no module at a path the base model had."""


def effective_weights(
    model: nn.Module,
    layers: Mapping[str, Layer],
    *,
    bias: bool = False,
    dense: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    constants: dict[str, Tensor] | None = None,
    stored: Mapping[str, Stored] = {},
) -> dict[str, Tensor]:
    """Return the effective weight `[rows, columns]` of each layer in its own dtype, in float64.

    `layers` maps a path of the base model to what stands there; a model that came back inside a wrapper is searched by
    the end of the path. With `bias` a last column holds what each layer answers to nothing. A layer that is torch's own
    and untouched is not asked, and `constants` takes what it answers to zeros; of the others, `dense` takes what they
    answer to `dense_input`. Inputs are of `dtype`, by default that of the model's first numbers, which a loader may
    have put there. What is as `stored` is not read again, without `bias`.

    Raises:
        MissingModuleError: a path is gone.
        ValueError: a module answers with another shape than its layer does.
    """
    modules, like, known = dict(model.named_modules()), numbers_of(model, dtype), torch_is_itself()

    def read(name: str, layer: Layer) -> Tensor:
        if layer.kind == "experts":
            return _stacked(_owner(modules, name), name, layer, bias=bias)
        module = _find(modules, name)
        if known and is_plain(module, layer, like):
            before = stored.get(name)
            if constants is not None:
                constants[name] = before.offset_of(module, layer) if before else offset_of(module, layer)
            return before.weight_of(module, layer) if before and not bias else weight_of(module, layer, bias=bias)
        return _asked(dense, name, module, layer, like, bias=bias)

    return {name: read(name, layer) for name, layer in layers.items()}


def _owner(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """Return the module that has the parameter at a path, below whatever wraps it.

    Raises:
        MissingModuleError: it is gone.
    """
    parent, _, leaf = path.rpartition(".")
    for module in _find(modules, parent).modules():
        if leaf in module._parameters or leaf in getattr(module, "parametrizations", ()):
            return module
    raise MissingModuleError(path)


@torch.no_grad()
def _stacked(module: nn.Module, path: str, layer: Layer, *, bias: bool) -> Tensor:
    """Return the matrices of a parameter of three dimensions below each other, as it is at this moment.

    Raises:
        ValueError: it has another shape.
    """
    weight: Tensor = getattr(module, path.rpartition(".")[2])
    each = (layer.rows // layer.experts, layer.columns)
    shape = (layer.experts, *(each[::-1] if layer.turned else each))
    if weight.shape != shape:
        raise ValueError(f"{path} is {tuple(weight.shape)}, but should be {shape}")
    stacked = (weight.mT if layer.turned else weight).double().cpu().flatten(0, 1)
    return torch.cat([stacked, stacked.new_zeros(len(stacked), 1)], 1) if bias else stacked.clone()


def weights_while_running(
    model: nn.Module,
    layers: Mapping[str, Layer],
    run: Callable[[nn.Module], object],
    *,
    bias: bool = False,
    dense: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the effective weights as they are inside the model's own forward, which `run` calls once.

    Some loaders put the LoRA in when the model begins to run and take it out at the end (functional calls, samplers
    that patch), others merge at the first run: a layer asked on its own then answers as if nothing were loaded.
    """
    modules, like = dict(model.named_modules()), numbers_of(model, dtype)
    found: dict[str, Tensor] = {}

    def read(name: str, module: nn.Module) -> None:
        if name not in found and layers[name].kind == "experts":
            found[name] = _stacked(module, name, layers[name], bias=bias)
        elif name not in found:
            found[name] = torch.empty(0)  # the probe calls the module again
            found[name] = _asked(dense, name, module, layers[name], like, bias=bias)

    def place(name: str) -> nn.Module:
        return _owner(modules, name) if layers[name].kind == "experts" else _find(modules, name)

    handles = [
        place(name).register_forward_pre_hook(lambda module, args, name=name: read(name, module)) for name in layers
    ]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    rest = {name: layer for name, layer in layers.items() if name not in found}
    found |= effective_weights(model, rest, bias=bias, dense=dense, dtype=dtype)
    return {name: found[name] for name in layers}


@torch.no_grad()
def _asked(
    dense: dict[str, Tensor] | None, name: str, module: nn.Module, layer: Layer, like: Tensor, *, bias: bool
) -> Tensor:
    x = None if dense is None else dense_input(layer, like.dtype)
    with _without_bias(module):
        if dense is not None and x is not None:
            _keep_dense(dense, name, module, layer, x.to(like.device))
        weight = _without_offset(module, layer, like)
    return torch.cat([weight, _ask_nothing(module, layer, like)[:, None]], dim=1) if bias else weight


def effective_weight(module: nn.Module, layer: Layer, like: Tensor | None = None, *, bias: bool = False) -> Tensor:
    """Return the weight `[rows, columns]` of `module` in float64, with a column for the bias when asked.

    A linear layer computes x @ W^T + constant, so its answers to the identity less its answer to 0 are W^T; a
    convolution is asked with one image per input channel and kernel place, an embedding with every token. The inputs
    have the dtype and device of `like`, by default those of the module's own numbers.
    """
    return _asked(None, "", module, layer, numbers_of(module) if like is None else like, bias=bias)


def _without_offset(module: nn.Module, layer: Layer, like: Tensor) -> Tensor:
    answer = _ASK[layer.kind](module, layer, like)
    if not isinstance(answer, Tensor) or answer.shape != (layer.columns + 1, layer.rows):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(
            f"module answers {got} to {layer.columns + 1} inputs, but should be {(layer.columns + 1, layer.rows)}"
        )
    answer = answer.double().cpu()
    return (answer[:-1] - answer[-1]).T


@cache
def dense_input(layer: Layer, dtype: torch.dtype) -> Tensor | None:
    """Return random inputs of a layer, every one of its columns in use: `[DENSE, columns]`; None where it takes none.

    Identity and zeros are what no model ever sends: what is right for them may be wrong for all else. Nobody else gets
    this tensor itself: a loader may write into what it is given.
    """
    if layer.kind in _WITHOUT_INPUT:
        return None
    generator = torch.Generator().manual_seed(layer.columns)
    single = torch.float32  # whatever the default is at the moment
    return torch.randn(DENSE, layer.columns, generator=generator, dtype=single).to(dtype)


@torch.no_grad()
def keep_dense(dense: dict[str, Tensor] | None, name: str, module: nn.Module, layer: Layer, like: Tensor) -> None:
    """Put what a layer answers to `dense_input`, less its answer to zeros, `[DENSE, rows]` in float64, into `dense`."""
    x = None if dense is None else dense_input(layer, like.dtype)
    if dense is None or x is None:
        return
    with _without_bias(module):
        _keep_dense(dense, name, module, layer, x.to(like.device))


def _keep_dense(dense: dict[str, Tensor], name: str, module: nn.Module, layer: Layer, x: Tensor) -> None:
    """Ask with four inputs and zeros in one batch, by turns, then with each of the others alone, as a batch of one.

    Neither half of the batch is then the one or the other, no rule for batches or for single inputs is missed, and
    what is kept for inputs of a shape is not that of the second one.
    """
    together = torch.stack([x[:-2], torch.zeros_like(x[:-2])], 1)
    if layer.kind == "conv":
        at, images = _images(layer, torch.cat([together.flatten(0, 1), x[-2:]]))
        several, *alone = (ask(module, some)[(..., *at)] for some in (images[:-2], images[-2:-1], images[-1:]))
    else:  # as a model does: a batch of sequences
        sequences = together.reshape(2, 2, 2, -1).transpose(1, 2).flatten(0, 1)
        several = ask(module, sequences).reshape(2, 2, 2, -1).transpose(1, 2)
        alone = [ask(module, one[None, None].clone()).flatten(0, 1) for one in x[-2:]]
    several, singles = several.double().cpu().reshape(4, 2, -1), [one.double().cpu() for one in alone]
    dense[name] = torch.cat([several[:, 0], *singles]) - torch.cat([several[:, 1], several[:2, 1]])


@torch.no_grad()
def offsets(
    model: nn.Module,
    layers: Mapping[str, Layer],
    dtype: torch.dtype | None = None,
    stored: Mapping[str, Stored] = {},
) -> dict[str, Tensor]:
    """Return what each linear layer and convolution answers to zeros of `dtype`, its bias: [rows] in float64.

    What is as `stored` is not read again.

    Raises:
        MissingModuleError: a path is gone.
    """
    modules, like, known = dict(model.named_modules()), numbers_of(model, dtype), torch_is_itself()

    def read(name: str, layer: Layer) -> Tensor:
        module, before = _find(modules, name), stored.get(name)
        if not known or not is_plain(module, layer, like):
            return _ask_nothing(module, layer, like)
        return before.offset_of(module, layer) if before else offset_of(module, layer)

    return {name: read(name, layer) for name, layer in layers.items() if layer.kind not in _WITHOUT_INPUT}


def ask(module: nn.Module, inputs: Tensor) -> Any:
    """Return what a layer answers that is not plain: code of the loader's own runs here, apart from all else."""
    return module(inputs)


def _ask_nothing(module: nn.Module, layer: Layer, like: Tensor) -> Tensor:
    if layer.kind == "embedding":
        return torch.zeros(layer.rows, dtype=torch.float64)
    size = [d * (k - 1) + 1 for k, d in zip(layer.kernel, layer.dilation, strict=True)]
    zeros = torch.zeros(1, layer.channels, *size, device=like.device, dtype=like.dtype)
    answer: Tensor = ask(module, zeros)
    return answer[0].reshape(layer.rows, -1)[:, 0].double().cpu()


def _ask_linear(module: nn.Module, layer: Layer, like: Tensor) -> object:
    probe = torch.eye(layer.columns, device=like.device, dtype=like.dtype)
    return ask(module, torch.cat([probe, torch.zeros_like(probe[:1])]))


def _ask_conv(module: nn.Module, layer: Layer, like: Tensor) -> object:
    """Ask with single pixels, each below one place of the kernel."""
    pixels = torch.eye(layer.columns + 1, layer.columns, device=like.device, dtype=like.dtype)
    at, images = _images(layer, pixels)
    answer = ask(module, images)
    whole = isinstance(answer, Tensor) and answer.dim() == 2 + len(layer.kernel)
    return answer[(..., *at)] if whole else answer


def _images(layer: Layer, windows: Tensor) -> tuple[list[int], Tensor]:
    """Return images `[n, channels, *sizes]` with `windows` `[n, columns]` in them, and at which output each is.

    A window lies wholly inside its image, where it meets no padding.
    """
    steps = tuple(zip(layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True))
    at = [-(-padding // stride) for _, stride, padding, _ in steps]  # the first output whose window meets no padding
    first = [y * stride - padding for y, (_, stride, padding, _) in zip(at, steps, strict=True)]
    size = [start + d * (k - 1) + 1 for start, (k, _, _, d) in zip(first, steps, strict=True)]
    images = windows.new_zeros(len(windows), layer.channels, *size)
    places = torch.cartesian_prod(*(torch.arange(n) for n in (layer.channels, *layer.kernel)))
    spacing = zip(first, layer.dilation, strict=True)
    pixels = (start + d * places[:, i] for i, (start, d) in enumerate(spacing, 1))
    images[(slice(None), places[:, 0], *pixels)] = windows  # type: ignore[index]
    return at, images


def _ask_embedding(module: nn.Module, layer: Layer, like: Tensor) -> object:
    answer = ask(module, torch.arange(layer.columns, device=like.device))
    return torch.cat([answer, torch.zeros_like(answer[:1])]) if isinstance(answer, Tensor) else answer


_ASK: Mapping[str, Callable[[nn.Module, Layer, Tensor], object]] = {
    "linear": _ask_linear,
    "transposed": _ask_linear,
    "conv": _ask_conv,
    "embedding": _ask_embedding,
}


def numbers_of(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the first number of a module, as of `dtype`: activations have its dtype and device."""
    first = first_number(module)
    return first if dtype in (None, first.dtype) else torch.empty(0, dtype=dtype, device=first.device)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return what stands at a path of the base model, with all that was put around it.

    Raises:
        MissingModuleError: nothing does.
    """
    return _find(dict(model.named_modules()), path)


def _find(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return the module at `name`, below whatever wraps the model: of paths that end in it the shortest."""
    if name in modules:
        return modules[name]
    matches = sorted((found for found in modules if found.endswith("." + name)), key=len)
    if not matches or [len(match) for match in matches[:2]] == [len(matches[0])] * 2:
        raise MissingModuleError(name)
    return modules[matches[0]]


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    """Zero every bias meanwhile: adding one in half precision would round the weight that is being read."""
    parts = [part for each in module.modules() for part in (each._parameters, each._buffers)]
    biases = [*{id(x): x for part in parts if (x := part.get("bias")) is not None}.values()]
    saved = [bias.detach().clone() for bias in biases]
    try:
        for bias in biases:
            bias.data.zero_()
        yield
    finally:
        for bias, value in zip(biases, saved, strict=True):
            bias.data.copy_(value)
