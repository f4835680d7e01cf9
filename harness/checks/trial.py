"""One trial: write the example as a file, take a fresh model through steps such as loading it, measure every layer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.benches import Bench, View
from harness.checks.cell import Cell
from harness.checks.observation import Observation, observation_of
from harness.errors import one_line
from harness.example import Example
from harness.files import FORMATS, LoraParts, match_modules, read_lora, write_lora
from harness.isolation.limits import CallFailedError, Raised, TimeLimitExceeded, guarded
from harness.loaders.protocol import Subject
from harness.measure.compare import norm
from harness.measure.effective import MissingModuleError, effective_weights, offsets, weights_while_running
from harness.measure.tolerance import UNIT_ROUNDOFF
from harness.variants import Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

File = Literal["example", "copy", "other"]
Call = Callable[["torch.nn.Module"], object]
_OTHER_WORDS = {"text_encoder": ("te", "text_encoders")}  # what kohya and ComfyUI call the part


@dataclass(frozen=True)
class Step:
    """One call of the subject: load a file of the trial, undo the last load, or set the strength of what is loaded.

    `rebuild` goes on with a new model. `times` multiplies the strength of the example, or the layers of that model (a
    power of two).
    `file`: the example's own, a copy of it, or the other example's.
    """

    kind: Literal["load", "unload", "set_strength", "rebuild"]
    times: float = 1.0
    file: File = "example"

    def call(self, subject: Subject, file: Callable[[File], Path], strength: float) -> Call:
        """Return the call to make on the model; what the subject does not declare does nothing."""
        wanted = self.times * strength
        if self.kind == "load":
            path = file(self.file)
            return lambda model: subject.load(model, path, strength=wanted)
        declared = subject.declaration
        if self.kind == "unload":
            return declared.unload or _nothing
        set_strength = declared.set_strength
        return (lambda model: set_strength(model, wanted)) if set_strength else _nothing


load: Callable[..., Step] = partial(Step, "load")
set_strength: Callable[[float], Step] = partial(Step, "set_strength")  # without loading again
rebuild: Callable[[float], Step] = partial(Step, "rebuild")
UNLOAD = Step("unload")


def _nothing(model: torch.nn.Module) -> None:
    return None


def run_trial(
    cell: Cell, example: Example, steps: Sequence[Step] = (load(),), *, other: Example | None = None
) -> Observation:
    """Take a fresh model through `steps`, by default one load of `example`, and measure it.

    `other` is the second file that a step may load.
    """
    import torch

    bench, bias = cell.bench, cell.variant.bias
    base = base_weights(bench, example.dtype, bias)
    updates = cell.variant.updates(example, cell.view, cell.view.gather(base))
    times = next((step.times for step in reversed(steps) if step.kind == "rebuild"), 1.0)
    before = base if times == 1 else {name: times * weight for name, weight in base.items()}
    model = bench.build(_dtype(example.dtype))
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        path = write_example(cell, example, updates, Path(folder))
        written, order = bytes_of(path), file_order(path, cell.view)

        def file(which: File) -> Path:
            if which == "other" and other is not None:
                own = cell.variant.updates(other, cell.view, cell.view.gather(base))
                return write_example(cell, other, own, Path(folder) / "other")
            return copy_of(path) if which == "copy" else path

        left: list[str] = []
        try:
            for step in steps:
                if step.kind == "rebuild":
                    model = _rebuilt(bench, example.dtype, step.times)
                    continue
                call = step.call(cell.subject, file, example.strength)
                model = guarded(model, call, cell.limit(cell.reproduce(example), cell.seconds), left)
            with cell.limit(cell.reproduce(example), cell.seconds):  # a loader may do its work at the first forward
                after = effective_weights(model, bench.layers, bias=bias)
                if all(torch.equal(before[name], after[name]) for name in bench.layers):
                    after = weights_while_running(model, bench.layers, bench.forward, bias=bias)
                shifted = () if bias else tuple(_shifted(bench, model, example.dtype))
        except (Exception, TimeLimitExceeded) as error:
            return Observation(example, raised=_raised(error))
        file_changed = bytes_of(path) != written
    view = cell.view
    seen = observation_of(cell, example, updates, view.gather(before), view.gather(after))
    others = (*seen.others_changed, *_other_state(bench, model, example.dtype, bias), *shifted, *left)
    return replace(seen, others_changed=tuple(dict.fromkeys(others)), file_changed=file_changed, order=order)


def _raised(error: BaseException) -> Raised:
    """Say how a call, or the measuring of the model that it left, went wrong."""
    if isinstance(error, CallFailedError):
        return error.raised
    if isinstance(error, MissingModuleError):
        return Raised("LH902", f"the loaded model has no module {error}")
    if isinstance(error, TimeLimitExceeded):
        return Raised("LH901", f"the loaded model does not answer: {error}", timed_out=True)
    return Raised("LH902", f"the loaded model does not run: {one_line(error)}")


def _rebuilt(bench: Bench, dtype: str, times: float) -> torch.nn.Module:
    model = bench.build(_dtype(dtype))
    for weight in {id(w): w for name in bench.layers if (w := model.get_submodule(name).weight) is not None}.values():
        weight.data.mul_(times)  # type: ignore[operator]  # nn.Module's attributes are tensors or modules
    return model


@cache
def base_weights(bench: Bench, dtype: str, bias: bool = False) -> dict[str, Tensor]:
    """Return the effective weights of the unloaded bench, in float64, with their biases when asked."""
    return effective_weights(bench.base(_dtype(dtype)), bench.layers, bias=bias)


@cache
def base_offsets(bench: Bench, dtype: str) -> dict[str, Tensor]:
    """Return what the layers of the unloaded bench answer to zeros, in float64."""
    return offsets(bench.base(_dtype(dtype)), bench.layers)


def _other_state(bench: Bench, model: torch.nn.Module, dtype: str, bias: bool) -> tuple[str, ...]:
    """Return the parameters and buffers that are not measured (biases, norms) and not what they were."""
    import torch

    measured = ("weight", "bias") if bias else ("weight",)
    weights = {f"{layer}.{kind}" for layer in bench.layers for kind in measured}
    expected = {name: value for name, value in bench.base(_dtype(dtype)).state_dict().items() if name not in weights}
    state = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found = {base: value for name, value in state if (base := _base_name(name)) in expected}
    return tuple(n for n, value in found.items() if not torch.equal(value.cpu().to(expected[n].dtype), expected[n]))


def _shifted(bench: Bench, model: torch.nn.Module, dtype: str) -> Iterator[str]:
    """Yield the layers whose answer to zeros changed: a bias is lost or scaled, or a hook adds to the output."""
    for name, value in offsets(model, bench.layers).items():
        expected = base_offsets(bench, dtype)[name]
        if norm(value - expected) > 8 * UNIT_ROUNDOFF[dtype] * norm(expected):
            yield f"{name}.bias"


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def write_example(cell: Cell, example: Example, updates: Mapping[str, Update], folder: Path) -> Path:
    """Write the example's LoRA below `folder` as the cell's format says it and return what a loader gets."""
    modules = {t.name: LoraParts(updates[t.name].parts, t.alpha) for t in example.targets}
    name = "adapter" if FORMATS[cell.format].folder else "adapter.safetensors"
    order, prefix = example.key_order(), _prefix(cell.format, cell.bench.component)
    root = cell.variant.root
    folder.mkdir(exist_ok=True)
    return write_lora(folder / name, cell.format, modules, rslora=root, key_order=order, prefix=prefix)


def copy_of(path: Path) -> Path:
    """Return a copy of the LoRA `path`, a file or a folder, under another name beside it."""
    other = path.with_name(f"renamed-{path.name}")
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, other)
    return other


def file_order(path: Path, view: View) -> tuple[str, ...]:
    """Return the targets of a written file, by their name in `view`, in the order of the file's keys."""
    adapter = read_lora(path)
    names, _ = match_modules(adapter, view.layers)
    return tuple(names[name] for name in adapter.modules)


def bytes_of(path: Path) -> dict[str, bytes]:
    """Return what is in the file `path`, or in each file of that folder, by name."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _prefix(format_name: str, component: str) -> str | None:
    """Return how keys of `component` begin where that is not the format's own way."""
    row = FORMATS[format_name]
    words = {component, *_OTHER_WORDS.get(component, ())}
    if component == "transformer" or row.prefixes.get(row.write_prefix) in words:
        return None
    return next((prefix for prefix, part in row.prefixes.items() if part in words), None)
