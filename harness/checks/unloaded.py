"""What the unloaded bench is, beside the weights that are measured: read once, held against every loaded model."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, equal  # bound here: a subject may replace torch's own

from harness.benches import Bench, View
from harness.measure.effective import effective_weights, numbers_of, offsets
from harness.measure.plain import Stored, is_plain

_STORING = ("linear", "conv")  # kinds of layers that may be torch's own


@cache
def base_weights(bench: Bench, dtype: str, bias: bool = False) -> dict[str, Tensor]:
    """Return the effective weights of the unloaded bench, in float64, with their biases when asked."""
    known = bench.known_weights(dtype)
    if known is None:
        return effective_weights(bench.base(getattr(torch, dtype)), bench.layers, bias=bias)
    return known if bias else {name: weight[:, :-1] for name, weight in known.items()}


@cache
def weights_seen(view: View, bench: Bench, dtype: str, bias: bool = False) -> dict[str, Tensor]:
    """Return the same under the names of the file."""
    return view.gather(base_weights(bench, dtype, bias))


@cache
def base_types(bench: Bench) -> dict[str, type]:
    """Return the class of each module of the unloaded bench, by path."""
    return {name: type(module) for name, module in bench.base().named_modules()}


@cache
def base_state(bench: Bench, dtype: str, bias: bool) -> dict[str, Tensor]:
    """Return the parameters and buffers of the unloaded bench that are not measured, under any of their names."""
    measured = ("weight", "bias") if bias else ("weight",)
    weights = {*bench.layers, *(f"{layer}.{kind}" for layer in bench.layers for kind in measured)}
    coded = tuple(f"{name}." for name, layer in bench.layers.items() if layer.codes or layer.computed)
    kept = {n: v for n, v in bench.base(getattr(torch, dtype)).state_dict().items() if isinstance(v, torch.Tensor)}
    places = {kept[n].data_ptr() for n in weights if n in kept and kept[n].numel()}
    own = {
        n: value for n, value in kept.items() if n not in weights | _moving(bench) and value.data_ptr() not in places
    }
    return {n: value for n, value in own.items() if not n.startswith(coded) or n.endswith(".bias")}


@cache
def _moving(bench: Bench) -> frozenset[str]:
    """Return what the unloaded bench changes itself when it runs: counters, running statistics, embeddings' norms."""
    model = bench.build()
    numbers = ((name, value) for name, value in model.state_dict().items() if type(value) is Tensor)  # codes stay
    before = {name: value.clone() for name, value in numbers}
    bench.forward(model)
    after = model.state_dict()
    return frozenset(name for name, value in before.items() if not same(after[name], value))


def same(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal, where what is no number counts as equal to itself."""
    if equal(value, expected):
        return True
    if value.shape != expected.shape:
        return False
    return bool(((value == expected) | ((value != value) & (expected != expected))).all())


@cache
def base_output(bench: Bench, dtype: str, cast: bool) -> Tensor:
    """Return what the unloaded bench in `dtype` answers, in float64; `cast` to float32 as it is."""
    model = bench.build(getattr(torch, dtype))
    return bench.forward(model.to(torch.float32) if cast else model).double()


@cache
def base_offsets(bench: Bench, dtype: str) -> dict[str, Tensor]:
    """Return what the layers of the unloaded bench answer to zeros, in float64."""
    return offsets(bench.base(getattr(torch, dtype)), bench.layers)


@cache
def stored_layers(bench: Bench, dtype: str) -> dict[str, Stored]:
    """Return the plain layers of the unloaded bench; none of a bench whose weights were told."""
    if bench.known_weights(dtype) is not None:
        return {}
    model, weights, offset = bench.base(getattr(torch, dtype)), base_weights(bench, dtype), base_offsets(bench, dtype)
    modules: dict[str, Any] = {n: model.get_submodule(n) for n, layer in bench.layers.items() if layer.kind in _STORING}
    like = numbers_of(model)
    return {
        n: Stored(module.weight, module.bias, weights[n], offset[n])
        for n, module in modules.items()
        if is_plain(module, bench.layers[n], like)
    }
