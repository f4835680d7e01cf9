"""What a loader in another process is given and gives back: its words, the model's weights, the merged ones."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import LoaderSpecError
from harness.text import count

if TYPE_CHECKING:
    import torch

SPARE_BYTES = 64 << 20


class OutputError(RuntimeError):
    """The merged file is missing, unreadable, too large, or does not fit the model."""

    refuses = False


def program_of(spec: str) -> list[str]:
    """Return the words of the command line that follows `kind:` in `spec`.

    A line that begins with `python` or `python3` runs the Python that runs this.

    Raises:
        LoaderSpecError: it cannot be split, or names no program.
    """
    try:
        words = shlex.split(spec.partition(":")[2])
    except ValueError as error:
        raise LoaderSpecError(f"{spec!r}: {error}") from None
    if not words:
        raise LoaderSpecError(f"{spec!r} names no program")
    if words[0] in ("python", "python3"):  # whichever comes first on the PATH may be another one, without torch
        words[0] = sys.executable
    if shutil.which(words[0]) is None:
        raise LoaderSpecError(f"{spec!r}: there is no program {words[0]!r} here or on the PATH")
    return words


def write_weights(model: torch.nn.Module, path: Path) -> None:
    """Write all of the model's tensors."""
    from safetensors.torch import save_file

    # Cloned because safetensors refuses tied weights, which share memory.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}, path)


def size_of(path: Path) -> int:
    """Return the bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def most_bytes(base: Path) -> int:
    """Return how large merged weights may be."""
    return 2 * size_of(base) + SPARE_BYTES


def load_back(model: torch.nn.Module, base: Path, out: Path, said: str = "") -> None:
    """Load the merged file, all of the model's tensors or only the changed ones, into `model`; `base` had them before.

    Raises:
        OutputError: it is not there or does not fit; `said` ends the message.
    """
    if not out.is_file():
        raise OutputError(f"the loader wrote no file at {{out}}{said}")
    if size_of(out) > most_bytes(base):
        expected = f"more than the {most_bytes(base)} expected at most"
        raise OutputError(f"the merged file has {size_of(out)} bytes, {expected}{said}")
    merged = _read(out, said)
    problem = _misfit(model.state_dict(), merged)
    if problem:
        raise OutputError(f"the merged file {problem}{said}")
    model.load_state_dict(merged, strict=False)


def _read(out: Path, said: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(out)
    except SafetensorError as error:
        raise OutputError(f"the merged file is no valid safetensors file: {error}{said}") from error


def _misfit(wanted: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]) -> str | None:
    if not merged:
        return "has no tensors"
    unknown = [name for name in merged if name not in wanted]
    if unknown:
        return f"has {count(len(unknown), 'tensor')} that the model has not, for example {unknown[0]!r}"
    for name, tensor in merged.items():
        if tensor.shape != wanted[name].shape:
            return f"has {name!r} with shape {list(tensor.shape)}, the model has {list(wanted[name].shape)}"
    return None
