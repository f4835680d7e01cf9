"""Answer lora-harness from any Python: a loader behind one line of JSON per load.

It needs torch and safetensors alone: where the harness is not installed, copy this file beside your loader.

    from serve import serve
    serve(load, name="acme", version="1.2", formats=["kohya"])

Without a server of your own, `python serve.py my_loader.py:load` serves that function. The protocol is docs/serve.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PROTOCOL = 1
HEARTBEAT_SECONDS = 1.0
_FRAMES = 5


def serve(
    load: Callable[..., Any],
    *,
    unload: Callable[[nn.Module], object] | None = None,
    set_strength: Callable[[nn.Module, float], object] | None = None,
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None,
    refusals: tuple[type[BaseException], ...] = (NotImplementedError,),
    **declared: Any,
) -> None:
    """Answer until stdin ends, calling `load(model, lora, strength=...)` and what else there is.

    `build(question)` makes the model of a question (default: `model_of`), whose weights are then loaded into it.
    An exception of `refusals` says that the loader does not take the file. `declared` is what the first line says
    of it besides: name, version, formats, benches, variants, ...
    """
    say = _sayer()
    say({"protocol": PROTOCOL, "unload": unload is not None, "set_strength": set_strength is not None, **declared})
    calls: dict[str, Callable[[Any, Mapping[str, Any]], object]] = {
        "load": lambda model, ask: load(model, Path(ask["lora"]), strength=ask["strength"]),
        "unload": lambda model, ask: unload(model) if unload else None,
        "set_strength": lambda model, ask: set_strength(model, ask["strength"]) if set_strength else None,
    }
    models: dict[int, nn.Module] = {}
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            with _Heart(say):
                model = models.get(ask["session"]) or _loaded(build or model_of, ask)
                done = calls[ask["op"]](model, ask)
                model = done if isinstance(done, nn.Module) else model
                save_file(weights_of(model, load_file(ask["model"])), ask["out"])
            models.clear()  # of one model at a time: the harness goes on with the next
            models[ask["session"]] = model
            say({"id": ask["id"], "done": True})
        except Exception as error:
            kind = "refused" if isinstance(error, refusals) else "error"
            say({"id": ask["id"], kind: f"{type(error).__name__}: {error}", "frames": _frames(error)})


def model_of(ask: Mapping[str, Any]) -> nn.Module:
    """Return a model of the class and configuration of a question, or plain layers where there is no such class.

    A plain layer is a Linear, a Conv2d of stride 1 or an Embedding, by the shape of its weight and its kind.
    """
    module, _, name = ask["class"].partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):  # diffusers wraps the ImportError of what it imports
        print(f"no {ask['class']} here: plain layers stand in for it", file=sys.stderr)
        return layers_of(ask)
    if hasattr(kind, "from_config"):
        config = {key: value for key, value in ask["config"].items() if not key.startswith("_")}
        return kind.from_config(config)  # type: ignore[no-any-return]  # diffusers
    return kind(kind.config_class.from_dict(ask["config"]))  # type: ignore[no-any-return]  # transformers


def weights_of(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what stands under `names` in a model: of a wrapped or hooked layer what it computes."""
    state = {_plain(name): value for name, value in model.state_dict().items()}
    modules = {_plain(name): module for name, module in model.named_modules()}
    found = {name: state[name] for name in names if name in state}
    for name in names:
        module = modules.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and module is not None and not _is_plain(module):
            found[name] = _computed(module, names[name])
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def _loaded(build: Callable[[Mapping[str, Any]], nn.Module], ask: Mapping[str, Any]) -> nn.Module:
    weights = load_file(ask["model"])
    model = build(ask).to(next(value.dtype for value in weights.values() if value.is_floating_point()))
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def layers_of(ask: Mapping[str, Any]) -> nn.Module:
    """Return plain layers, and the other tensors of a question's model, under their names."""
    weights = load_file(ask["model"])
    root = nn.Module()
    for path, kind in ask["layers"].items():
        *way, last = path.split(".")
        at = root
        for name in way:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(last, _layer(kind, weights.get(f"{path}.weight"), f"{path}.bias" in weights))
    for name, value in weights.items():
        _hold(root, name.split("."), value)
    return root


def _layer(kind: str, weight: Tensor | None, bias: bool) -> nn.Module:
    shape = () if weight is None else tuple(weight.shape)
    if len(shape) == 2 and kind == "Embedding":
        return nn.Embedding(*shape)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=bias)
    return nn.Module()


def _hold(at: nn.Module, path: list[str], value: Tensor) -> None:
    """Register a tensor that no layer has, such as the weight of a norm."""
    for name in path[:-1]:
        if not hasattr(at, name):
            at.add_module(name, nn.Module())
        at = getattr(at, name)
    if not hasattr(at, path[-1]):
        at.register_buffer(path[-1], value)


def _plain(name: str) -> str:
    """Return the name in the base model for one inside PEFT's wrappers, of which there may be several."""
    return re.sub(r"(^|\.)(?:base_model\.model\.|base_layer\.)+", r"\1", name)


def _is_plain(module: nn.Module) -> bool:
    own = type(module).__module__.startswith(("torch.nn.modules", "transformers.", "diffusers."))
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return own and not hooked and not hasattr(module, "parametrizations")


@torch.no_grad()
def _computed(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight, shaped like `weight`, that a wrapped layer computes with: its answers to the identity."""
    rows, columns = weight.shape[0], weight.shape[1]
    if weight.dim() == 4:
        return _computed_kernel(module, weight)
    if weight.dim() != 2:
        raise NotImplementedError(f"a wrapped {type(module).__name__} with a weight of shape {list(weight.shape)}")
    if any(isinstance(inner, nn.Embedding) for inner in module.modules()):
        return module(torch.arange(rows))  # type: ignore[no-any-return]
    ask = torch.cat([torch.eye(columns), torch.zeros(1, columns)]).to(weight)
    answer = module(ask)
    return (answer[:-1] - answer[-1]).T  # type: ignore[no-any-return]


def _computed_kernel(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the kernel of a wrapped convolution: how one output that meets no padding depends on each input."""
    inner = next(each for each in module.modules() if isinstance(each, nn.Conv2d) and each.weight.shape == weight.shape)
    sides = [(inner.kernel_size[i], inner.stride[i], int(inner.padding[i]), inner.dilation[i]) for i in (0, 1)]
    at = [-(-padding // stride) for _, stride, padding, _ in sides]
    first = [y * stride - padding for y, (_, stride, padding, _) in zip(at, sides, strict=True)]
    size = [start + d * (k - 1) + 1 for start, (k, _, _, d) in zip(first, sides, strict=True)]
    images = torch.zeros(1, weight.shape[1], *size).to(weight)
    jacobian: Callable[..., Tensor] = torch.autograd.functional.jacobian
    with torch.enable_grad():
        slopes = jacobian(lambda x: module(x)[0, :, at[0], at[1]], images)[:, 0]
    y, x = (slice(start, None, d) for start, (_, _, _, d) in zip(first, sides, strict=True))
    return slopes[:, :, y, x]


class _Heart:
    """Sends a heartbeat now and then while the block runs."""

    def __init__(self, say: Callable[[Mapping[str, Any]], None]) -> None:
        self._say, self._over = say, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            self._say({"heartbeat": True})


def _sayer() -> Callable[[Mapping[str, Any]], None]:
    """Take stdout for the answers: what is printed goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    return say


def _frames(error: BaseException) -> list[str]:
    own = [step for step in traceback.extract_tb(error.__traceback__) if step.filename != __file__]
    return [f"{Path(step.filename).name}:{step.lineno} in {step.name}: {step.line}" for step in own[-_FRAMES:]]


def function_of(spec: str) -> Callable[..., Any]:
    """Return the function that `file.py:function` or `package.module:function` names."""
    where, _, name = spec.rpartition(":")
    if not where.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(where), name)  # type: ignore[no-any-return]
    sys.path.insert(0, str(Path(where).resolve().parent))
    described = importlib.util.spec_from_file_location(Path(where).stem, where)
    assert described is not None
    assert described.loader is not None
    module = sys.modules[described.name] = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python serve.py FILE.py:FUNCTION")
    torch.set_num_threads(1)
    serve(function_of(sys.argv[1]), name=sys.argv[1])
