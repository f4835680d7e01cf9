"""Benches in another interpreter: given by description and weights, so that both sides measure the same model.

Where the loader takes any model, plain layers stand at the bench's paths, and no library that has the bench's class is
needed there. Else, and where experts are stacked in a parameter, the bench's own class is built by whatever release of
its library is there, and gets the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches.bench import Bench, Noise
from harness.benches.layer import Layer
from harness.benches.registry import built_bench, get_bench, give_bench
from harness.errors import UserError, one_line

if TYPE_CHECKING:
    import torch

_PLACES = 4  # inputs of a layer, in a forward of plain layers


def describe_benches(names: Iterable[str], folder: Path, *, plain: bool) -> dict[str, Any]:
    """Return a description, JSON, of benches, whose weights are written to `folder`."""
    return {
        name: _described(get_bench(name), folder / f"{index}.safetensors", plain) for index, name in _numbered(names)
    }


def _numbered(names: Iterable[str]) -> Iterable[tuple[int, str]]:
    return enumerate(dict.fromkeys(names))


def _described(bench: Bench, path: Path, plain: bool) -> dict[str, Any]:
    from safetensors.torch import save_file

    state = {name: value.clone().contiguous() for name, value in bench.base().state_dict().items()}
    save_file(state, path)  # cloned: weights that are tied share memory, which safetensors refuses
    layers = {name: asdict(layer) for name, layer in bench.layers.items()} if plain and not bench.experts else None
    return {"weights": str(path), "layers": layers}


def take_benches(described: Mapping[str, Any]) -> None:
    """Let `get_bench` return the benches that were described, instead of those that this interpreter would build."""
    for name, told in described.items():
        give_bench(name, partial(_plain, name, told) if told["layers"] else partial(_own, name, told["weights"]))


def _own(name: str, path: str) -> Bench:
    """Return the bench that this interpreter builds, with the weights given.

    Raises:
        UserError: the library has no such model in this release.
    """
    try:
        bench = built_bench(name)
    except (ImportError, RuntimeError) as error:  # diffusers wraps the ImportError of what it imports
        raise UserError(f"bench {name} is no model of this release ({one_line(error)})") from error
    own = replace(bench, make=lambda: _with_weights(bench.make(), path, name))

    def run(model: Any, noise: Noise) -> Any:
        return own.run(model, noise) if own.run and _runs(own) else _run(own.layers, model, noise)

    return replace(own, run=run)


_running: dict[str, bool] = {}


def _runs(own: Bench) -> bool:
    """Whether the untouched model can be called here as the present release's is: else its layers are, one by one."""
    if own.name not in _running:
        try:
            own.forward(own.base())
            _running[own.name] = True
        except Exception:  # whatever another signature leads to
            _running[own.name] = False
    return _running[own.name]


def _with_weights(model: Any, path: str, name: str) -> Any:
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise UserError(f"bench {name}: its class is another one in this release ({one_line(error)})") from error
    return model


def _plain(name: str, told: Mapping[str, Any]) -> Bench:
    layers = {path: Layer(**{**fields, **_tuples(fields)}) for path, fields in told["layers"].items()}
    return Bench(
        name, 0, lambda: _filled(_tree(layers), told["weights"]), (), lambda model, noise: _run(layers, model, noise)
    )


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}


def _tree(layers: Mapping[str, Layer]) -> torch.nn.Module:
    import torch

    tree = torch.nn.Module()
    for path, layer in layers.items():
        *way, last = path.split(".")
        place = tree
        for part in way:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, _module(layer))
    return tree


def _module(layer: Layer) -> torch.nn.Module:
    from torch import nn

    if layer.kind == "linear":
        return nn.Linear(layer.columns, layer.rows, bias=layer.bias)
    if layer.kind == "embedding":
        return nn.Embedding(layer.columns, layer.rows)
    if layer.kind == "conv":
        geometry: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        kernel: Any = layer.kernel
        return nn.Conv2d(layer.channels, layer.rows, kernel, bias=layer.bias, **geometry)
    from transformers.pytorch_utils import Conv1D

    conv: nn.Module = Conv1D(layer.rows, layer.columns)
    return conv


def _filled(tree: torch.nn.Module, path: str) -> torch.nn.Module:
    from safetensors.torch import load_file

    own = tree.state_dict()
    tree.load_state_dict({name: value for name, value in load_file(path).items() if name in own})
    return tree


def _run(layers: Mapping[str, Layer], model: Any, noise: Noise) -> torch.Tensor:
    """Return what all layers answer, each to an input of its own.

    A wrapper may stand before a layer's path; a longer path may end in the same words (`blocks.0.proj_out`).
    """
    import torch

    modules = dict(model.named_modules())
    names = {path: min((name for name in modules if f".{name}".endswith(f".{path}")), key=len) for path in layers}
    return torch.cat([modules[names[path]](_input(layer, noise)).flatten() for path, layer in layers.items()])


def _input(layer: Layer, noise: Noise) -> torch.Tensor:
    import torch

    if layer.kind == "embedding":
        return torch.arange(min(_PLACES, layer.columns))
    if layer.kind == "conv":
        size = [d * (k - 1) + 1 + s for k, s, d in zip(layer.kernel, layer.stride, layer.dilation, strict=True)]
        return noise(1, layer.channels, *size)
    return noise(_PLACES, layer.columns)
