"""Which files a checkpoint is: one, a folder, the shards of an index, or a pipeline's model and its components."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.errors import LoraFileError
from harness.files import SafetensorsFile, read_header
from harness.files.gguf_file import GgufFile, is_gguf, read_gguf
from harness.text import parse_json, printable

_INDEX = ".safetensors.index.json"
_PIPELINE = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MODEL_FOLDERS = ("transformer", "unet")
_COMPONENT = re.compile(r"(?:text_encoder|vae|image_encoder|transformer|unet)(?:_\d)?")
_SHARD = re.compile(r"(.+-)(\d{1,9})(-of-(\d{1,6})\.safetensors)")
_VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)(?=[.-])")  # in the names of a component's other files
_MAX_INDEX_BYTES = 50_000_000


def opened(path: Path) -> SafetensorsFile | GgufFile:
    """Read the header of one file."""
    return read_gguf(path, model=True) if is_gguf(path) else read_header(path)


def config_beside(path: Path) -> dict[str, Any]:
    """Return the model's config.json, empty when there is none or it cannot be read: only quantisation needs it."""
    return _json_in(path.parent / "config.json")


def _json_in(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds, empty when there is none or it cannot be read."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def weight_files(path: Path) -> Iterator[Path]:
    """Yield the safetensors files that make up a checkpoint."""
    if path.name.endswith(_INDEX):
        return iter(_shards(path))
    if not path.is_dir():
        return iter([path])
    models = [path / name for name in _MODEL_FOLDERS if (path / name).is_dir()]
    if models and _is_pipeline(path):
        return weight_files(models[0])
    if found := _in_folder(path):
        return iter(found)
    if not models:
        pickled = next((one.name for one in sorted(path.iterdir()) if one.suffix in PICKLES), None)
        what = f"; {printable(pickled, 60)} is a pickle, which can run code when opened" if pickled else ""
        raise LoraFileError(path, f"a folder without safetensors files, the weights of a model are needed{what}")
    return weight_files(models[0])


def _is_pipeline(path: Path) -> bool:
    """Tell whether a folder says that its models lie in folders of their own, whatever else lies beside them."""
    return (path / _PIPELINE).is_file()


def listed(path: Path) -> list[str]:
    """Return the components that a pipeline's folder lists, or those of a folder that lists none, by their usual names.

    Empty for other paths.
    """
    if not path.is_dir():
        return []
    if _is_pipeline(path):
        found = _json_in(path / _PIPELINE).items()
        return [name for name, what in found if isinstance(what, list) and all(what) and Path(name).name == name]
    return [part.name for part in sorted(path.glob("*")) if part.is_dir() and _COMPONENT.fullmatch(part.name)]


def components(path: Path) -> list[Path]:
    """Return the folders with weights that a pipeline's folder has beside its model."""
    if (
        not path.is_dir()
        or (any(path.glob("*.safetensors")) and not _is_pipeline(path))
        or not any((path / name).is_dir() for name in _MODEL_FOLDERS)
    ):
        return []
    model = next(name for name in _MODEL_FOLDERS if (path / name).is_dir())
    folders = (path / name for name in listed(path) if name != model)
    return [folder for folder in folders if any(folder.glob("*.safetensors"))]


def of_component(folder: Path) -> Iterator[SafetensorsFile]:
    """Yield the files of a component, their tensors named by its folder."""
    for path in _in_folder(folder):
        file = read_header(path)
        yield replace(file, tensors={f"{folder.name}.{key}": info for key, info in file.tensors.items()})


def _in_folder(folder: Path) -> list[Path]:
    """Return the files of one model: those of its index, or all; no variants (`model.fp16.…`) beside the plain ones."""
    indexes, files = (_plain(sorted(folder.glob(f"*{end}"))) for end in (_INDEX, ".safetensors"))
    if len(indexes) == 1:
        return _shards(indexes[0])
    _refuse_missing(folder, [path.name for path in files])
    return files


def _refuse_missing(folder: Path, names: list[str]) -> None:
    """Refuse shards of which one is not there, by the numbers in their names, where no index names them."""
    for name in names:
        if part := _SHARD.fullmatch(name):
            every = (f"{part[1]}{number:0{len(part[2])}}{part[3]}" for number in range(1, int(part[4]) + 1))
            if lost := next((each for each in every if each not in names), None):
                raise LoraFileError(
                    folder, f"lacks the shard {printable(lost, 80)}, which {printable(name, 80)} speaks of"
                )


def _plain(paths: list[Path]) -> list[Path]:
    return [path for path in paths if not _VARIANT.search(path.name)] or paths


def _shards(index: Path) -> list[Path]:
    """Return the shards that an index names; they must lie beside it."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise LoraFileError(index, f"is larger than {_MAX_INDEX_BYTES:,} bytes")
        content = parse_json(index.read_bytes(), limit=_MAX_INDEX_BYTES)
        shards = sorted(set(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraFileError(index, f"is no index of shards ({printable(error, 80)})") from error
    outside = [name for name in shards if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise LoraFileError(index, f"names a shard outside its folder: {printable(outside[0], 80)}")
    return [index.parent / name for name in shards]
