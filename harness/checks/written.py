"""How an example of a cell stands on disk: the file, a copy of it under another name, the order of its keys."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.benches import View
from harness.example import Example
from harness.files import FORMATS, LoraParts, LoraWeights, match_modules, read_lora, write_lora
from harness.variants import Update

if TYPE_CHECKING:
    from torch import Tensor

    from harness.checks.trial import Cell

_OTHER_WORDS = {"text_encoder": ("te", "text_encoders")}  # what kohya and ComfyUI call the part


def write_example(cell: Cell, example: Example, updates: Mapping[str, Update], folder: Path) -> Path:
    """Write the example's LoRA below `folder` as the cell's format says it and return what a loader gets."""
    modules = {t.name: _weights(updates[t.name].parts, t.alpha) for t in example.targets}
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


def writable(format_name: str, layer: str) -> bool:
    """Whether the format has a name for this layer."""
    naming = FORMATS[format_name].naming
    return naming is None or naming.write(layer) is not None


def _weights(parts: Mapping[str, Tensor], alpha: float | None) -> LoraWeights | LoraParts:
    return LoraWeights(parts["A"], parts["B"], alpha) if set(parts) == {"A", "B"} else LoraParts(parts, alpha)


def _prefix(format_name: str, component: str) -> str | None:
    """Return how keys of `component` begin where that is not the format's own way."""
    row = FORMATS[format_name]
    words = {component, *_OTHER_WORDS.get(component, ())}
    if component == "transformer" or row.prefixes.get(row.write_prefix) in words:
        return None
    return next((prefix for prefix, part in row.prefixes.items() if part in words), None)
