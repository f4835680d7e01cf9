"""The files of a trial: examples written as the cell's format says, one when it is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.checks.cell import Cell
from harness.checks.patterns import rewrite_patterns
from harness.checks.unloaded import weights_seen
from harness.checks.work import NEXT
from harness.errors import UserError
from harness.example import Example
from harness.files import FORMATS, LoraParts
from harness.files.write import write_in_order
from harness.variants import Update

if TYPE_CHECKING:
    from torch import Tensor

File = Literal["example", "copy", "other", "replaced"]
_OTHER_WORDS = {"text_encoder": ("te", "text_encoders")}  # what kohya and ComfyUI call the part


def updates_of(cell: Cell, example: Example) -> dict[str, Update]:
    """Return the update of every target, by name."""
    base = weights_seen(cell.view, cell.bench, example.dtype, cell.variant.bias)
    return cell.variant.updates(example, cell.view, base)


def sample_file(cell: Cell, example: Example, folder: Path) -> Path:
    """Write the file of an example below `folder`, as the cell's loader would get it, and return what it gets.

    Raises:
        UserError: no file of the cell can say the example.
    """
    try:
        return write_example(cell, example, updates_of(cell, example), folder)
    except ValueError as error:
        raise UserError(f"{cell.place}: {error}") from error


@dataclass(frozen=True)
class TrialFiles:
    """The files of a trial, below `folder`; each is written when it is asked for."""

    cell: Cell
    own: Example
    updates: Mapping[str, Update]
    second: Example | None
    folder: Path

    @cached_property
    def _written(self) -> tuple[Path, tuple[str, ...]]:
        return _write(self.cell, self.own, self.updates, self.folder)

    @property
    def example(self) -> Path:
        """The example's own file, or folder, as a loader gets it."""
        return self._written[0]

    @property
    def order(self) -> tuple[str, ...]:
        """The targets in the order of the file's keys."""
        return self._written[1]

    def path(self, which: File) -> Path:
        """Return the path of a file."""
        if which == "other" and self.second is not None:
            return self._other(self.folder / "other")
        if which == "replaced" and self.second is not None:
            path = self.folder / "replaced" / _file_name(self.cell)
            if not path.exists():
                self._other(path.parent)
                write_example(self.cell, self.own, self.updates, path.parent / NEXT)
            return path
        return copy_of(self.example) if which == "copy" else self.example

    def _other(self, folder: Path) -> Path:
        assert self.second is not None
        return write_example(self.cell, self.second, updates_of(self.cell, self.second), folder)


def _file_name(cell: Cell) -> str:
    row = FORMATS[cell.format]
    return "adapter" if row.folder else f"adapter{row.suffix}"


def write_example(cell: Cell, example: Example, updates: Mapping[str, Update], folder: Path) -> Path:
    """Write the example's LoRA below `folder` as the cell's format says it and return what a loader gets."""
    return _write(cell, example, updates, folder)[0]


def _write(cell: Cell, example: Example, updates: Mapping[str, Update], folder: Path) -> tuple[Path, tuple[str, ...]]:
    layers = ((t, cell.view.layers[t.name]) for t in example.targets)
    modules = {
        t.name: LoraParts(updates[t.name].parts, t.alpha, layer.experts if layer.kind == "experts" else 0)
        for t, layer in layers
    }
    order, prefix = example.key_order(), prefix_of(cell)
    root = cell.variant.root
    folder.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"rslora": root, "key_order": order, "prefix": prefix, "durable": False, "trained": True}
    path, names = write_in_order(folder / _file_name(cell), cell.format, modules, **how)
    rewrite_patterns(path, example.patterns)
    return path, names


def tensors_of(path: Path) -> Path:
    """Return the file that holds the tensors of a LoRA, which may be a folder."""
    return next(path.glob("*.safetensors")) if path.is_dir() else path


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write the tensors of the LoRA `path` again as `change` returns them, the header as it was."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = tensors_of(path)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata)


def copy_of(path: Path) -> Path:
    """Return a copy of the LoRA `path`, a file or a folder, under another name beside it."""
    other = path.with_name(f"renamed-{path.name}")
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, other)
    return other


def bytes_of(path: Path) -> dict[str, bytes]:
    """Return what is in the file `path`, or in each file of that folder, by name."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def prefix_of(cell: Cell) -> str | None:
    """Return how keys of the bench's component begin where that is not the format's own way."""
    row, component = FORMATS[cell.format], cell.bench.component
    words = {component, *_OTHER_WORDS.get(component, ())}
    if component == "transformer" or row.prefixes.get(row.write_prefix) in words:
        return None
    return next((prefix for prefix, part in row.prefixes.items() if part in words), None)
