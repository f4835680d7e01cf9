"""A bench: one small real model, the layers a LoRA may target in it, and one fixed forward pass."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.benches.layer import Layer, Rows, View, layer_of, regroup
from harness.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Noise = Callable[..., "torch.Tensor"]


@dataclass(frozen=True)
class Bench:
    """A deterministic small model.

    `make` builds it in float32, with torch's generator at `seed`; `run(model, noise)` calls it once, where
    `noise(*shape)` draws an input of the model's dtype. `targets` are the suffixes of the layers LoRA is trained on in
    practice; `component` is what a pipeline calls the model. `fused` names, by suffix, the layers whose rows stack
    several projections, with their number; `split` and `merged` say how the same layers are called where those are
    apart, or are one (see `View`).
    """

    name: str
    seed: int
    make: Callable[[], Any]
    targets: tuple[str, ...]
    run: Callable[[Any, Noise], Any]
    fused: tuple[tuple[str, int], ...] = ()
    component: str = "transformer"
    split: Callable[[], Mapping[str, Rows]] | None = None
    merged: Callable[[], Mapping[str, Rows]] | None = None
    _cast: dict[torch.dtype, torch.nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)
    _templates: dict[torch.dtype, Template] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def _base(self) -> torch.nn.Module:
        import torch

        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model: torch.nn.Module = self.make().eval().requires_grad_(False)
            return model
        except (ImportError, RuntimeError) as error:  # diffusers wraps the ImportError of what it imports
            why = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise UserError(f"bench {self.name} cannot be built with the installed packages: {why[0]}") from error

    def base(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """Return the shared model in `dtype` (default float32), to be read and never changed."""
        import torch

        dtype = dtype or torch.float32
        if dtype not in self._cast:
            # nn.Module's own `to`: diffusers' override logs a line on every call
            self._cast[dtype] = torch.nn.Module.to(copy.deepcopy(self._base), dtype)
        return self._cast[dtype]

    def build(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """Return a fresh copy with equal weights every time, rounded to `dtype` (default float32)."""
        import torch

        dtype = dtype or torch.float32
        if dtype not in self._templates:
            self._templates[dtype] = Template(self.base(dtype))
        return self._templates[dtype].build()

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every layer of the model that a LoRA could change, by path."""
        return {name: found for name, module in self._base.named_modules() if (found := layer_of(module))}

    @cached_property
    def view(self) -> View:
        """The model's own layers."""
        return View(self.name, self.layers, tuple(n for n in self.layers if n.endswith(self.targets)), self.fused)

    @cached_property
    def split_view(self) -> View | None:
        """The layers of a LoRA that was trained with q, k and v apart, on a model that has them merged."""
        return regroup(self.view, self.split()) if self.split else None

    @cached_property
    def merged_view(self) -> View | None:
        """The layers of a LoRA that was trained with q, k and v merged, on a model that has them apart."""
        return regroup(self.view, self.merged()) if self.merged else None

    @property
    def lora_layers(self) -> tuple[str, ...]:
        """The paths of the layers that `targets` select, in the model's order."""
        return self.view.lora_layers

    def forward(self, model: torch.nn.Module) -> torch.Tensor:
        """Run `model` once on this bench's fixed input, without gradients."""
        import torch

        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            output: torch.Tensor = self.run(model, lambda *shape: torch.randn(shape, generator=generator).to(weight))
        return output


class Template:
    """A model taken apart once, into its tensors and a pickle of all the rest, that never leaves this process.

    Copies of it take a fifth of the time of `copy.deepcopy`; a check builds a fresh model for every example.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(model)
        self._rest, self._tensors = file.getvalue(), pickler.tensors

    def build(self) -> torch.nn.Module:
        """Return a new model with tensors of its own; those that were shared inside the model are shared again."""
        model: torch.nn.Module = _Unpickler(io.BytesIO(self._rest), self._tensors).load()
        return model


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        import torch

        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._index[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors, self._copies = tensors, dict[int, "Tensor"]()

    def persistent_load(self, pid: int) -> Tensor:
        if pid not in self._copies:
            self._copies[pid] = _copy(self._tensors[pid])
        return self._copies[pid]


def _copy(tensor: Tensor) -> Tensor:
    import torch

    if type(tensor) is torch.nn.Parameter:  # half of the time of a deep copy
        return torch.nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return copy.deepcopy(tensor)


_MODULES = {
    "qwen-image": "qwen_image",
    "qwen-image-fused": "qwen_image",
    "sd-unet": "sd_unet",
    "flux": "flux",
    "clip-text": "text_models",
    "gpt2": "text_models",
    "tiny-llama": "text_models",
    "qwen-image-deep": "qwen_image",
}


_given: dict[str, Callable[[], Bench]] = {}


def give_bench(name: str, make: Callable[[], Bench]) -> None:
    """Let `get_bench` return what `make` returns for `name` from now on in this process."""
    _given[name] = make
    get_bench.cache_clear()


@cache
def get_bench(name: str) -> Bench:
    """Return the bench called `name`.

    Raises:
        UserError: no bench has this name.
    """
    return _given[name]() if name in _given else built_bench(name)


def built_bench(name: str) -> Bench:
    """Return the bench called `name` as this interpreter builds it.

    Raises:
        UserError: no bench has this name.
    """
    if name not in _MODULES:
        raise UserError(f"bench={name!r}: no such bench; known are {', '.join(bench_names())}")
    benches: tuple[Bench, ...] = import_module(f"harness.benches.{_MODULES[name]}").BENCHES
    return next(bench for bench in benches if bench.name == name)


def bench_names() -> tuple[str, ...]:
    """Return the names of all benches."""
    return tuple(_MODULES)
