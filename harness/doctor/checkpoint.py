"""A model's weights on disk: one safetensors file, a folder of them, or shards with an index; rows only on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from harness.doctor.match import match_layers, shared_prefix
from harness.errors import LoraFileError
from harness.files import LoraAdapter, SafetensorsFile, TensorInfo, read_header
from harness.files.safetensors_file import torch_name
from harness.text import parse_json, printable

_INDEX = ".safetensors.index.json"
_WEIGHT = ".weight"
_NORM_BYTES = 1 << 22
_MODEL_FOLDERS = ("transformer", "unet")
_MAX_INDEX_BYTES = 50_000_000


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name without the checkpoint's own prefix (`model.diffusion_model.`); nothing is loaded.

    `names` maps each such name to the key in the file, `files` maps that key to the file that has it.
    """

    path: Path
    files: Mapping[str, SafetensorsFile]
    prefix: str = ""
    _norms: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    _room: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read the headers.

        Raises:
            LoraFileError: nothing readable there, a shard is missing, or two files have the same tensor.
        """
        path = Path(path)
        files: dict[str, SafetensorsFile] = {}
        for file in (read_header(found) for found in _weight_files(path)):
            twice = next((key for key in file.keys if key in files), None)
            if twice is not None:
                raise LoraFileError(path, f"is in {files[twice].path.name} and {file.path.name}", key=printable(twice))
            files.update(dict.fromkeys(file.keys, file))
        if not files:
            raise LoraFileError(path, "holds no tensor")
        return cls(path, files, shared_prefix([key for key in files if key.endswith(_WEIGHT)]))

    @cached_property
    def names(self) -> dict[str, str]:
        """Every tensor by its name without the prefix."""
        return {key.removeprefix(self.prefix): key for key in self.files}

    @cached_property
    def layers(self) -> dict[str, str]:
        """The tensor of every layer with a weight, by the layer's name with the prefix.

        Raises:
            LoraFileError: no tensor is the weight of a layer.
        """
        layers = {
            key.removesuffix(_WEIGHT): key.removeprefix(self.prefix) for key in self.files if key.endswith(_WEIGHT)
        }
        if not layers:
            raise LoraFileError(self.path, "holds no weight of a layer")
        return layers

    def match(self, adapter: LoraAdapter) -> dict[str, str]:
        """Return {module of the adapter: tensor name without the prefix}."""
        return {module: self.layers[found.layer] for module, found in match_layers(adapter, self.layers).items()}

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of a tensor."""
        key = self.names[name]
        return self.files[key].tensors[key]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as torch names it; unknown ones as the file does."""
        return torch_name(self.info(name).dtype)

    def rows(self, name: str, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Return rows [start, stop) of a tensor, as stored, flattened to two dimensions; in `room` if given.

        Raises:
            LoraFileError: the file changed since its header was read, or this torch does not know its dtype.
        """
        key = self.names[name]
        part = self.files[key].rows(key, start, stop, room)
        return part.flatten(1) if part.dim() > 1 else part.reshape(-1, 1)

    def chunks(self, name: str) -> Callable[[int, int], Tensor]:
        """Return what reads rows of a tensor into one memory of this checkpoint; fresh memory costs as much as reading.

        They hold until rows of any tensor are read so again.
        """
        info = self.info(name)
        width = (info.end - info.start) // max((*info.shape, 1)[0], 1)

        def read(start: int, stop: int) -> Tensor:
            size = (stop - start) * width
            if not self._room or len(self._room[0]) < size:
                self._room[:] = [torch.empty(size, dtype=torch.uint8)]
            return self.rows(name, start, stop, self._room[0])

        return read

    def norm(self, name: str) -> float:
        """Return ||W||_F, accumulated in float64: torch's own float32 norm is off by 2e-3 at 40 million elements."""
        if name not in self._norms:
            info = self.info(name)
            rows = info.shape[0] if info.shape else 1
            step = max(1, _NORM_BYTES * rows // max(info.end - info.start, 1))
            read = self.chunks(name)
            parts = (read(start, start + step) for start in range(0, rows, step))
            wide = (part if part.dtype.itemsize > 1 else part.float() for part in parts)
            norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in wide]
            self._norms[name] = math.hypot(*norms)
        return self._norms[name]


def _weight_files(path: Path) -> Iterator[Path]:
    """Yield the safetensors files that make up a checkpoint."""
    if path.name.endswith(_INDEX):
        return iter(_shards(path))
    if not path.is_dir():
        return iter([path])
    indexes = sorted(path.glob(f"*{_INDEX}"))
    if len(indexes) == 1:
        return iter(_shards(indexes[0]))
    found = sorted(path.glob("*.safetensors"))
    if found:
        return iter(found)
    models = [path / name for name in _MODEL_FOLDERS if (path / name).is_dir()]
    if not models:
        raise LoraFileError(path, "a folder without safetensors files, the weights of a model are needed")
    return _weight_files(models[0])


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
