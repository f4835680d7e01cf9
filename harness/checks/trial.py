"""One trial: write the example as a file, have a model taken through steps where the loader runs, compare layers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.benches import View
from harness.checks.cell import Cell
from harness.checks.measuring import DENSE, WEIGHT, Kind, Order, answering, base_weights
from harness.checks.observation import Observation, observation_of
from harness.example import Example
from harness.files import FORMATS, LoraParts, match_modules, read_lora, write_lora
from harness.isolation.calls import Raised, lost_raised
from harness.isolation.subject import Here, SubjectLostError
from harness.measure.compare import norm
from harness.measure.effective import dense_input
from harness.measure.tolerance import UNIT_ROUNDOFF, coarser
from harness.variants import Update

if TYPE_CHECKING:
    from torch import Tensor

File = Literal["example", "copy", "other"]
_OTHER_WORDS = {"text_encoder": ("te", "text_encoders")}  # what kohya and ComfyUI call the part
_ROUNDINGS = 32  # of a dense answer: the sum, and B @ (A @ x) whose parts are larger than their product
_SHARE = 0.05  # of the change, below which a dense answer is a matter of precision


@dataclass(frozen=True)
class Step:
    """One call of the subject: load a file of the trial, undo the last load, or set the strength of what is loaded.

    `rebuild` goes on with a new model. `times` multiplies the strength of the example, or the layers of that model (a
    power of two).
    `file`: the example's own, a copy of it, or the other example's.
    """

    kind: Kind
    times: float = 1.0
    file: File = "example"


load: Callable[..., Step] = partial(Step, "load")
set_strength: Callable[[float], Step] = partial(Step, "set_strength")  # without loading again
rebuild: Callable[[float], Step] = partial(Step, "rebuild")
UNLOAD = Step("unload")


def run_trial(
    cell: Cell, example: Example, steps: Sequence[Step] = (load(),), *, other: Example | None = None
) -> Observation:
    """Take a fresh model through `steps`, by default one load of `example`, and measure it.

    `other` is the second file that a step may load.
    """
    base = base_weights(cell.bench, example.dtype, cell.variant.bias)
    updates = cell.variant.updates(example, cell.view, cell.view.gather(base))
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        files = _Files(cell, example, updates, other, Path(folder))
        written, order = bytes_of(files.example), file_order(files.example, cell.view)
        orders = tuple(
            (s.kind, _number(s, example), str(files.path(s.file)) if s.kind == "load" else "") for s in steps
        )
        try:
            answer = _asked(cell, example, orders)
        except SubjectLostError as lost:
            return Observation(example, raised=lost_raised(lost))
        file_changed = bytes_of(files.example) != written
    if "raised" in answer:
        return Observation(example, raised=Raised(**answer["raised"]))
    times = next((step.times for step in reversed(steps) if step.kind == "rebuild"), 1.0)
    seen = _observation(cell, example, updates, times, answer)
    return replace(seen, file_changed=file_changed, order=order)


def _number(step: Step, example: Example) -> float:
    return step.times if step.kind == "rebuild" else step.times * example.strength


def _asked(cell: Cell, example: Example, steps: tuple[tuple[Kind, float, str], ...]) -> dict[str, Any]:
    """Have the trial done where the subject's code runs, and check that what comes back can be its answer.

    Raises:
        SubjectLostError: nothing came back, or something else.
    """
    bias = cell.variant.bias
    order = Order(cell.bench_name, example.dtype, steps, cell.allowed, bias)
    with cell.watch(cell.reproduce(example), (len(steps) + 1) * cell.allowed):
        asked = cell.asked or Here(answering(cell.subject))
        answer = asked.ask(asdict(order), cell.allowed, parts=len(steps) + 1)
    problem = _problem(answer, cell, base_weights(cell.bench, example.dtype, bias))
    if problem:
        raise SubjectLostError("raised", f"its process sent {problem}")
    return {"tensors": {}, **answer}


def _problem(answer: Any, cell: Cell, base: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with an answer that no harness wrote, or None."""
    if not isinstance(answer, dict):
        return "no measurements"
    if "raised" in answer:
        fields = answer["raised"]
        known = isinstance(fields, dict) and fields.keys() <= Raised.__dataclass_fields__.keys() and "what" in fields
        return None if known and fields.get("code") in ("LH901", "LH902", "LH903") else "a failure without its code"
    others = answer.get("others")
    if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
        return "measurements without their names"
    if not isinstance(tensors := answer.get("tensors", {}), dict):
        return "measurements without their weights"
    shapes = {WEIGHT + name: tuple(weight.shape) for name, weight in base.items()}
    shapes |= {DENSE + name: (4, len(weight)) for name, weight in base.items()}
    for key, tensor in tensors.items():
        if shapes.get(key) != tuple(getattr(tensor, "shape", ())) or str(tensor.dtype) != "torch.float64":
            return f"a tensor that no layer of {cell.bench_name} has"
    return None


def _observation(
    cell: Cell, example: Example, updates: Mapping[str, Update], times: float, answer: Mapping[str, Any]
) -> Observation:
    base = base_weights(cell.bench, example.dtype, cell.variant.bias)
    tensors, view = answer["tensors"], cell.view
    before = base if times == 1 else {name: times * weight for name, weight in base.items()}
    after = {name: tensors.get(WEIGHT + name, weight) for name, weight in base.items()}
    seen = observation_of(cell, example, updates, view.gather(before), view.gather(after))
    bent = tuple(_bent(cell, example, before, after, tensors))
    return replace(seen, others_changed=tuple(dict.fromkeys((*seen.others_changed, *answer["others"]))), bent=bent)


def _bent(
    cell: Cell,
    example: Example,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> Iterator[str]:
    """Yield the layers whose answer to dense input is not that of the weight they show to the identity."""
    import torch

    roundoff = UNIT_ROUNDOFF[coarser(example.dtype, example.file_dtype)]
    for name, layer in cell.bench.layers.items():
        if DENSE + name not in tensors:
            continue
        x = dense_input(layer, getattr(torch, example.dtype))
        assert x is not None
        weight, change = (w[:, : layer.columns] for w in (after[name], after[name] - before[name]))
        off = norm(tensors[DENSE + name] - x.double() @ weight.T)
        rounding = _ROUNDINGS * roundoff * norm(x.double()) * norm(weight) / layer.columns**0.5
        if not off <= max(rounding, _SHARE * norm(x.double() @ change.T)) and bool(weight.isfinite().all()):
            yield name


@dataclass(frozen=True)
class _Files:
    """The files of a trial, below `folder`; each is written when it is asked for."""

    cell: Cell
    own: Example
    updates: Mapping[str, Update]
    second: Example | None
    folder: Path

    @property
    def example(self) -> Path:
        path = self.folder / _file_name(self.cell)
        return path if path.exists() else write_example(self.cell, self.own, self.updates, self.folder)

    def path(self, which: File) -> Path:
        """Return the path of a file."""
        if which == "other" and self.second is not None:
            base = base_weights(self.cell.bench, self.second.dtype, self.cell.variant.bias)
            updates = self.cell.variant.updates(self.second, self.cell.view, self.cell.view.gather(base))
            return write_example(self.cell, self.second, updates, self.folder / "other")
        return copy_of(self.example) if which == "copy" else self.example


def _file_name(cell: Cell) -> str:
    return "adapter" if FORMATS[cell.format].folder else "adapter.safetensors"


def write_example(cell: Cell, example: Example, updates: Mapping[str, Update], folder: Path) -> Path:
    """Write the example's LoRA below `folder` as the cell's format says it and return what a loader gets."""
    modules = {t.name: LoraParts(updates[t.name].parts, t.alpha) for t in example.targets}
    order, prefix = example.key_order(), _prefix(cell.format, cell.bench.component)
    root = cell.variant.root
    folder.mkdir(exist_ok=True)
    return write_lora(folder / _file_name(cell), cell.format, modules, rslora=root, key_order=order, prefix=prefix)


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
