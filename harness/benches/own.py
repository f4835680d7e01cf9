"""A bench of one's own: a function that builds a model, and what `@bench` says of it."""

from __future__ import annotations

import inspect
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from harness.benches.answer import first_tensor
from harness.benches.bench import Bench, Noise, ends_with
from harness.benches.layer import Layer, Rows, layer_of
from harness.errors import UserError, one_line
from harness.isolation.child import is_out_of_memory
from harness.text import is_printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ATTRIBUTE = "__lora_harness_bench__"
_SEED = 31
F = TypeVar("F", bound=Callable[[], Any])


@dataclass(frozen=True)
class OwnBench:
    """What `@bench` said of a function; `targets` None stands for all layers that a LoRA can change."""

    name: str
    targets: tuple[str, ...] | None = None
    run: Callable[..., Any] | None = field(default=None, compare=False)
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)
    component: str = "transformer"
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    experts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return all but the forward, as JSON."""
        fused = {end: dict(parts) for end, parts in self.fused.items()}
        targets = None if self.targets is None else list(self.targets)
        said = {"name": self.name, "targets": targets, "fused": fused, "component": self.component}
        return {**said, "names": dict(self.names), "experts": list(self.experts), "runs": self.run is not None}

    def split(self, layers: Mapping[str, Layer]) -> dict[str, Rows]:
        """Return where in `layers` the rows are of what training kept apart."""
        found: dict[str, Rows] = {}
        for end, parts in self.fused.items():
            for path in (path for path in layers if ends_with(path, (end,))):
                start, parent = 0, path[: -len(end)]
                for part, rows in parts.items():
                    found[parent + part] = ((path, slice(start, start + rows)),)
                    start += rows
        return found


def bench(
    name: str,
    *,
    targets: Iterable[str] | str | None = None,
    run: Callable[..., Any] | None = None,
    fused: Mapping[str, Mapping[str, int]] | None = None,
    component: str = "transformer",
    names: Mapping[str, str] | None = None,
    experts: Iterable[str] | str = (),
) -> Callable[[F], F]:
    """Make a bench of a function without arguments that builds a small model; the function is returned as it is.

    `targets` are how the paths of the layers end that LoRA is trained on, without them every layer that a LoRA can
    change. `run(model)` calls the model once and returns a tensor; it may draw its inputs with torch, whose generator
    is seeded and whose default dtype is the model's. `fused` says of layers that stack several projections which, with
    how many rows, in order. `component` is the model's name in a pipeline, which files of some formats begin with.
    `names` maps runs of words in the layers' paths to what files have instead. `experts` are how the paths of
    parameters of three dimensions end, `[experts, out, in]`, or `[experts, in, out]` where their module says
    `is_transposed`: files adapt them as PEFT's `target_parameters`.

    The weights are drawn after a seed of the harness's, and the function is called anew in each process.

    >>> @bench("my-gpt", fused={"qkv": {"q": 32, "k": 16, "v": 16}})
    ... def my_gpt(): ...

    Raises:
        UserError: something that cannot be meant.
    """
    if not isinstance(name, str):
        raise UserError('write @bench("a-name"): a bench has a name')
    chosen = (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets)
    stacked = (experts,) if isinstance(experts, str) else tuple(experts)
    said = OwnBench(name, chosen, run, dict(fused or {}), component, dict(names or {}), stacked)
    _check(said)
    return declare_as(said)


def declare_as(said: OwnBench) -> Callable[[F], F]:
    """Return what says this of a function."""

    def declare(make: F) -> F:
        setattr(make, _ATTRIBUTE, said)
        return make

    return declare


def declared(make: Callable[..., Any]) -> OwnBench | None:
    """Return what `make` declared with `@bench`, None when it declared nothing."""
    found = getattr(make, _ATTRIBUTE, None)
    return found if isinstance(found, OwnBench) else None


def _check(said: OwnBench) -> None:
    where = f"@bench({said.name!r})"
    if not said.name.strip() or not is_printable(said.name) or any(char in said.name for char in " /:"):
        raise UserError(f"{where}: a name has letters, digits, dots and dashes")
    if said.targets == () or not all(isinstance(end, str) and end.strip(". ") for end in said.targets or ()):
        raise UserError(f"{where}: targets={said.targets!r} names no layer; leave it out for every layer")
    if not all(isinstance(end, str) and end.strip(". ") for end in said.experts):
        raise UserError(f'{where}: experts={said.experts!r} are no ends of paths, as in "experts.gate_up_proj"')
    if said.experts and said.run is None:
        raise UserError(f"{where}: experts need run=, because what is added to them shows only while the model runs")
    if said.run is not None and not callable(said.run):
        raise UserError(f"{where}: run is {type(said.run).__name__}, not a function run(model)")
    if not isinstance(said.component, str):
        raise UserError(f"{where}: component={said.component!r} is no name")
    for end, parts in said.fused.items():
        if not isinstance(parts, Mapping) or not parts or not all(_is_length(rows) for rows in parts.values()):
            raise UserError(f"{where}: fused[{end!r}] maps each projection to its number of rows, at least 1")
    if not all(isinstance(text, str) for text in (*said.names, *said.names.values())) or "" in said.names:
        raise UserError(f"{where}: names maps words in the paths of layers to the words that files have")


def _is_length(rows: object) -> bool:
    return isinstance(rows, int) and not isinstance(rows, bool) and rows > 0


def bench_of(said: OwnBench, make: Callable[[], Any], spec: str) -> Bench:
    """Return the bench that a function and what it declared make; `spec` names it in messages and on command lines."""
    what = f"bench {said.name}" if said.name == spec else f"bench {said.name} ({spec})"
    run = None if said.run is None else _running(said.run)
    fused = tuple((end, tuple(parts.values())) for end, parts in said.fused.items())
    factory = _Factory(make, what)
    return Bench(
        said.name,
        _SEED,
        factory,
        said.targets,
        run,
        fused,
        said.component,
        names=said.names,
        spec=spec,
        experts=said.experts,
    )


@dataclass(frozen=True)
class _Factory:
    """The author's function, its failures told in a sentence."""

    make: Callable[[], Any]
    what: str

    def __call__(self) -> torch.nn.Module:
        """Return the model.

        Raises:
            UserError: it raises, wants too much memory or returns something else.
        """
        import torch

        try:
            with undisturbed(), _seeded():
                model = self.make()
        except (KeyboardInterrupt, UserError):
            raise
        except BaseException as error:  # a script that ends the process is no end of the run
            if isinstance(error, Exception) and is_out_of_memory(error):
                raise UserError(f"{self.what}: {TOO_LARGE}") from error
            raise UserError(f"{self.what}: its function raises {one_line(error)}") from error
        if not isinstance(model, torch.nn.Module):
            raise UserError(f"{self.what}: its function returns {_kind(model)}, but should return a torch.nn.Module")
        if why := _unusable(model):
            raise UserError(f"{self.what}: {why}")
        _fill_biases(model)
        return model


def _unusable(model: torch.nn.Module) -> str:
    import torch

    if isinstance(model, torch.jit.ScriptModule):
        return "its function returns a TorchScript module, whose layers cannot be changed; return the model itself"
    if hasattr(model, "_orig_mod"):
        return "its function returns a compiled model; return the model itself"
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return "it has lazy layers, which have no weights before they run; call the model once in its function"
    if any(tensor.is_meta for tensor in model.parameters()):
        return "its weights are on the device meta, without values; build it on the CPU"
    return ""


TOO_LARGE = "the model does not fit into the memory allowed: a bench is small, give it fewer and narrower layers"


def _kind(found: object) -> str:
    parts = [name for name in ("transformer", "unet", "model") if hasattr(found, name)]
    return f"{type(found).__name__} (return its .{parts[0]})" if parts else type(found).__name__


def _fill_biases(model: torch.nn.Module) -> None:
    """Give biases that begin at zero values: nobody sees the loss of a zero."""
    import torch

    for module in model.modules():
        bias = getattr(module, "bias", None) if layer_of(module) else None
        if isinstance(bias, torch.Tensor) and bias.is_floating_point() and bias.numel() and not bias.any():
            bias.data.normal_(std=0.05)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put back after the block what holds for the whole process: torch's defaults, and the current folder."""
    import torch

    dtype, device, threads, folder = (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        None,
    )
    with suppress(OSError):
        folder = os.getcwd()
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        if folder:
            os.chdir(folder)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed Python's and NumPy's generators inside the block, as torch's is."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy.random.get_state() if numpy else None
    random.seed(_SEED)
    if numpy:
        numpy.random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        if numpy:
            numpy.random.set_state(before[1])


def _running(run: Callable[..., Any]) -> Callable[[Any, Noise], Tensor]:
    """Return `run` as benches call it: its draws seeded, floating tensors of the input's dtype where none is said."""
    takes_noise = _positional(run) > 1

    def call(model: torch.nn.Module, noise: Noise) -> Tensor:
        import torch

        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            torch.set_default_dtype(noise(0).dtype)
            try:
                return first_tensor(run(model, noise) if takes_noise else run(model))
            finally:
                torch.set_default_dtype(before)

    return call


def _positional(run: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(run).parameters.values()
    except (TypeError, ValueError):
        return 1
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(needed)
