"""A bench: one small real model, the layers a LoRA may target in it, and one fixed forward pass."""

from __future__ import annotations

import copy
import itertools
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from harness.benches.codes import cast
from harness.benches.layer import Layer, Rows, View, experts_of, layer_of, parameter_of, regroup, renamed
from harness.benches.template import Template
from harness.errors import UserError
from harness.example import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Noise = Callable[..., "torch.Tensor"]


@dataclass(frozen=True, eq=False)
class Bench:
    """A deterministic small model.

    `make` builds it in float32, with torch's generator at `seed`; `run(model, noise)` calls it once, where
    `noise(*shape)` draws an input of the model's dtype; None where nobody said how. `targets` are how the paths of the
    layers end that LoRA is trained on in practice, None for every layer; `component` is what a pipeline calls the
    model. `fused` says of layers, by the end of their path, into how many projections their rows divide, or how many
    rows each has; `split` and `merged` say how the same layers are called where those are apart, or are one (see
    `View`). `names` are runs of a path's words, and what files have there instead. `experts` are how the paths of
    parameters end that stack the matrices of experts. `option` names it on the command line. It is checked in `dtypes`.
    """

    name: str
    seed: int
    make: Callable[[], Any]
    targets: tuple[str, ...] | None
    run: Callable[[Any, Noise], Any] | None
    fused: tuple[tuple[str, int | Sequence[int]], ...] = ()
    component: str = "transformer"
    split: Callable[[], Mapping[str, Rows]] | None = None
    merged: Callable[[], Mapping[str, Rows]] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    spec: str | None = None
    dtypes: tuple[str, ...] = DTYPES
    copies: bool = True
    experts: tuple[str, ...] = ()
    _cast: dict[torch.dtype, torch.nn.Module] = field(default_factory=dict, init=False, repr=False)
    _templates: dict[torch.dtype, Template] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _base(self) -> torch.nn.Module:
        return self.made()

    def made(self) -> torch.nn.Module:
        """Return a model that `make` built, from the seed, in float32."""
        import torch

        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():  # what hangs on a graph cannot be copied
                torch.manual_seed(self.seed)
                model: torch.nn.Module = self.make().eval().requires_grad_(False)
        except (ImportError, RuntimeError) as error:  # diffusers wraps the ImportError of what it imports
            why = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise UserError(f"bench {self.name} cannot be built with the installed packages: {why[0]}") from error
        fill_zeros(model, self.seed)
        return cast(model, torch.float32)

    def base(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """Return the shared model in `dtype` (default float32), to be read and never changed."""
        import torch

        dtype = dtype or torch.float32
        if dtype not in self._cast:
            model = copy.deepcopy(self._base) if self.copies else self.made()
            self._cast[dtype] = cast(model, dtype)
        return self._cast[dtype]

    def build(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """Return a fresh copy with equal weights every time, rounded to `dtype` (default float32)."""
        import torch

        dtype = dtype or torch.float32
        if not self.copies:
            return cast(self.made(), dtype)
        if dtype not in self._templates:
            self._templates[dtype] = Template(self.base(dtype))
        return self._templates[dtype].build()

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """Every layer of the model that a LoRA could change, by path."""
        modules = {name: found for name, module in self._base.named_modules() if (found := layer_of(module))}
        return modules | experts_of(self._base, self.experts)

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The layers that `targets` select, by path in the model; where nobody said which, all that share no weight."""
        if self.targets is None:
            return tuple(name for name in self.layers if name not in {*self.shared, *self.shared.values()})
        return tuple(name for name in self.layers if ends_with(name, (*self.targets, *self.experts)))

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """The layers that share the weight of an earlier one, as embeddings and heads do, with that one."""
        return shared(self._base, self.layers)

    @cached_property
    def uncalled(self) -> tuple[str, ...]:
        """The layers that one forward does not call, such as `out_proj` of `nn.MultiheadAttention`.

        The model reads their weights by itself, or does without: a hook, or an adapter in their place, never runs.
        """
        if self.run is None:
            return ()
        model, seen = self.base(), set[str]()
        names = [name for name, layer in self.layers.items() if layer.kind != "experts"]
        with ExitStack() as hooks:
            for name in names:
                hook = model.get_submodule(name).register_forward_pre_hook(partial(_note, seen, name))
                hooks.callback(hook.remove)
            self.forward(model)
        return tuple(name for name in names if name not in seen)

    def known_weights(self, dtype: str) -> dict[str, Tensor] | None:
        """Return the layers' weights, with a column for the bias, where they are known without a model."""
        return None

    @cached_property
    def _own(self) -> View:
        """The model's own layers under their own names."""
        parts = {name: rows for name, layer in self.layers.items() if (rows := self._parts(name, layer))}
        return View(self.name, self.layers, self.chosen, parts)

    def _parts(self, name: str, layer: Layer) -> tuple[int, ...]:
        """Return how many rows each of the matrices has that a layer stacks; nothing for an ordinary one."""
        rows = layer.rows
        if layer.kind == "experts":
            return (rows // layer.experts,) * layer.experts
        parts = next((parts for end, parts in self.fused if ends_with(name, (end,))), ())
        return (rows // parts,) * parts if isinstance(parts, int) else tuple(parts)

    def _named(self, view: View) -> View:
        return renamed(view, self.file_name) if self.names else view

    def file_name(self, name: str) -> str:
        """Return what files call the layer at a path."""
        for words, instead in self.names.items():
            name = re.sub(rf"(?<![^.]){re.escape(words)}(?![^.])", instead.replace("\\", r"\\"), name)
        return name.strip(".").replace("..", ".")

    @cached_property
    def view(self) -> View:
        """The model's layers as files name them."""
        return self._named(self._own)

    @cached_property
    def split_view(self) -> View | None:
        """The layers of a LoRA that was trained with q, k and v apart, on a model that has them merged."""
        return self._named(regroup(self._own, self.split())) if self.split else None

    @cached_property
    def merged_view(self) -> View | None:
        """The layers of a LoRA that was trained with q, k and v merged, on a model that has them apart."""
        return self._named(regroup(self._own, self.merged())) if self.merged else None

    @property
    def lora_layers(self) -> tuple[str, ...]:
        """The layers that `targets` select as files name them, in the model's order."""
        return self.view.lora_layers

    def measures(self, tried: Collection[str]) -> Iterator[str]:
        """Yield what is measured of a bench that was brought along, and what is not, a sentence each.

        `tried` are the layers, as files name them, that a LoRA is tried on.
        """
        yield from ()

    @property
    def option(self) -> str:
        """What names it on the command line."""
        return f"--bench {shlex.quote(self.spec or self.name)}"

    def forward(
        self, model: torch.nn.Module, dtype: torch.dtype | None = None, *, gradients: bool = False
    ) -> torch.Tensor:
        """Run `model` once on this bench's fixed input, without gradients or with them; nothing where it has none.

        `dtype` is that of the base it was loaded into: its first weight may be a loader's own, of another dtype.
        """
        import torch

        if self.run is None:
            return torch.empty(0)
        like = first_number(model)
        if dtype is not None:
            like = torch.empty(0, dtype=first_number(self.base(dtype)).dtype, device=like.device)
        generator = torch.Generator().manual_seed(7)
        with torch.set_grad_enabled(gradients):
            output: torch.Tensor = self.run(model, lambda *shape: torch.randn(shape, generator=generator).to(like))
        return output.detach()


def _note(seen: set[str], name: str, *_: object) -> None:
    seen.add(name)


def first_number(module: torch.nn.Module) -> torch.Tensor:
    """Return the first floating tensor of a module that is no code: activations have its dtype and device."""
    import torch

    numbers = itertools.chain(module.parameters(), module.buffers())
    return next((x for x in numbers if x.is_floating_point() and x.dtype.itemsize > 1), torch.empty(0))


def shared(model: torch.nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Return the layers that share the weight of an earlier one, with that one."""
    weights = {name: parameter_of(model, name, layer) for name, layer in layers.items()}  # held: ids stay their own
    first, found = dict[int, str](), dict[str, str]()
    for name, weight in weights.items():
        other = name if weight is None else first.setdefault(id(weight), name)
        if other != name:
            found[name] = other
    return found


def ends_with(path: str, ends: Sequence[str]) -> bool:
    """Whether a path is one of `ends`, or ends in one of them at a dot."""
    return any(path == end or path.endswith(f".{end}") for end in ends)


def fill_zeros(model: torch.nn.Module, seed: int) -> None:
    """Give layers that begin at zero, as those of adaLN-zero do, weights: on a zero nothing that scales W shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        layer = layer_of(module)
        weight = getattr(module, "weight", None) if layer and not layer.codes else None
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.numel() and not weight.any():
            drawn = torch.randn(weight.shape, generator=generator) / max(1, weight.shape[-1]) ** 0.5
            weight.data.copy_(drawn)
