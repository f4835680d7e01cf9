"""From a path to an opened source: the folder or file, its validated header and the configuration beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.errors import LoraFileError
from harness.files.format import CONFIG_NAME, MLX_WEIGHTS_NAME, WEIGHTS_NAME, Source
from harness.files.gguf_file import is_gguf, read_gguf
from harness.files.safetensors_file import read_header
from harness.files.tensor_file import os_problem
from harness.text import parse_json, printable

_MAX_CONFIG_BYTES = 8_000_000
_PICKLED = "adapter_model.bin"
_NAMED = (WEIGHTS_NAME, MLX_WEIGHTS_NAME)  # the names that have a configuration beside them
_SUFFIXES = (".safetensors", ".gguf")


def open_source(path: Path | str) -> Source:
    """Open a LoRA file, or a folder that holds one.

    The configuration is read when the weights are `adapter_model.safetensors` (PEFT) or `adapters.safetensors`
    (mlx-lm); `Source.path` is then the folder.

    Raises:
        LoraFileError: one sentence saying what is missing or malformed.
    """
    path = Path(path)
    try:
        weights = _weights_in(path) if _is_folder(path) else path
        file = read_gguf(weights) if is_gguf(weights) else read_header(weights)
        config = _config(weights.parent / CONFIG_NAME) if weights.name in _NAMED else None
    except OSError as error:
        raise LoraFileError(path, os_problem(error)) from error
    return Source(weights.parent if config is not None else weights, file, config)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _weights_in(folder: Path) -> Path:
    if named := next((folder / name for name in _NAMED if (folder / name).exists()), None):
        return named
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _SUFFIXES)
    if len(found) == 1:
        return folder / found[0]
    if found:
        shown = ", ".join(printable(name, 60) for name in found[:4])
        raise LoraFileError(folder, f"a folder with {len(found)} safetensors files ({shown}, …): name one of them")
    if (folder / _PICKLED).exists():
        raise LoraFileError(folder / _PICKLED, "is a pickle, which can run code when opened: save it as safetensors")
    raise LoraFileError(folder, f"a folder without {WEIGHTS_NAME} or any other safetensors file")


def _config(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
        raise LoraFileError(path, f"is not a regular file of at most {_MAX_CONFIG_BYTES:,} bytes")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise LoraFileError(path, str(error)) from error
    if not isinstance(value, dict):
        raise LoraFileError(path, f"holds a JSON {type(value).__name__}, an object is needed")
    return value
