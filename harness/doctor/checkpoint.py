"""A model's weights on disk: one safetensors file, a folder of them, or shards with an index; rows only on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.doctor.architectures import Shape
from harness.doctor.match import Placement, match_layers, place, shared_prefix
from harness.errors import LoraFileError
from harness.files import LoraAdapter, SafetensorsFile, TensorInfo, read_header
from harness.files.tensor_file import is_float
from harness.text import parse_json, printable

_INDEX = ".safetensors.index.json"
_WEIGHT = ".weight"
_FEW_BYTES = 1 << 19
_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
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
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)
    _streams: dict[Path, FileIO] = field(default_factory=dict, repr=False, compare=False)

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

    @property
    def shapes(self) -> dict[str, Shape | None]:
        """The shape of every layer by its name with the prefix; None where codes are stored that are no weights."""
        infos = {layer: self.info(tensor) for layer, tensor in self.layers.items()}
        return {layer: info.shape if is_float(info.dtype) else None for layer, info in infos.items()}

    def place(self, adapter: LoraAdapter) -> Placement:
        """Return where every module of the adapter goes; the layers of slots are keys of `layers`."""
        return place(adapter, self.shapes)

    def match(self, adapter: LoraAdapter) -> dict[str, str]:
        """Return {module of the adapter: tensor name without the prefix}."""
        return {module: self.layers[found.layer] for module, found in match_layers(adapter, self.layers).items()}

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of a tensor."""
        key = self.names[name]
        return self.files[key].tensors[key]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as torch names it; unknown ones as the file does."""
        return _DTYPES.get(self.info(name).dtype, self.info(name).dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a tensor, as stored, flattened to two dimensions.

        A few rows are read as bytes, because a page fault in a mapped file brings in megabytes around it.

        Raises:
            LoraFileError: the file changed since its header was read, or this torch does not know its dtype.
        """
        key = self.names[name]
        path = self.files[key].path
        try:
            part = self._few(name, start, stop)
            if part is None:
                part = self._mapped(path).get_slice(key)[start:stop]
        except (SafetensorError, OSError, RuntimeError, AttributeError, ValueError) as error:
            raise LoraFileError(path, f"cannot be read ({printable(error)})", key=printable(key)) from error
        return part.flatten(1) if part.dim() > 1 else part.reshape(-1, 1)

    def norm(self, name: str) -> float:
        """Return ||W||_F, accumulated in float64: torch's own float32 norm is off by 2e-3 at 40 million elements."""
        if name not in self._norms:
            weight = self.rows(name, 0, (*self.info(name).shape, 1)[0])
            weight = weight if weight.dtype.itemsize > 1 else weight.float()
            self._norms[name] = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
            self.release()
        return self._norms[name]

    def release(self) -> None:
        """Unmap the files, so that what was read of them no longer counts as memory of this process."""
        self._handles.clear()

    def _mapped(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = safe_open(str(path), framework="pt")
        return self._handles[path]

    def _few(self, name: str, start: int, stop: int) -> Tensor | None:
        """Return rows read as bytes; None when they are many."""
        info, kind = self.info(name), getattr(torch, self.dtype(name), None)
        rows = info.shape[0] if info.shape else 1
        width = (info.end - info.start) // max(rows, 1)
        size = (min(stop, rows) - start) * width
        if kind is None or not 0 < size <= _FEW_BYTES or not hasattr(os, "pread"):
            return None
        raw = os.pread(self._descriptor(name), size, info.start + start * width)
        if len(raw) < size:
            raise ValueError("the file is shorter than it was")
        return torch.frombuffer(bytearray(raw), dtype=kind).reshape(-1, *info.shape[1:])

    def __del__(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _descriptor(self, name: str) -> int:
        path = self.files[self.names[name]].path
        if path not in self._streams:
            self._streams[path] = path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._streams[path].fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return self._streams[path].fileno()


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
