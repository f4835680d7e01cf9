"""A model's weights on disk: a safetensors or GGUF file, a folder, or shards with an index; rows only on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.doctor.checkpoint_files import (
    PICKLES,
    components,
    config_beside,
    listed,
    of_component,
    opened,
    weight_files,
)
from harness.doctor.llama_cpp import NATIVE, Translation, scheme, translation
from harness.doctor.match import Placement, match_layers, place
from harness.doctor.quantised import StorageScheme, Tensors, idle, schemes
from harness.doctor.spelling import layer_of, shared_prefix
from harness.errors import LoraFileError
from harness.files import LoraAdapter, SafetensorsFile, TensorInfo
from harness.files.architectures import Shape
from harness.files.gguf_file import GgufFile, model_names
from harness.files.safetensors_file import torch_name
from harness.files.tensor_file import is_float
from harness.text import printable

_WEIGHT = ".weight"
_NORM_ELEMENTS = 1 << 21
_ENCODER = "text_encoder"  # how the folders of text encoders begin, beside a pipeline's model


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name without the checkpoint's own prefix (`model.diffusion_model.`); nothing is loaded.

    `names` maps each such name to the key in the file, `files` maps that key to the file that has it. `config` is the
    model's own config.json, as far as there is one. Weights are the real ones where the file holds quantised codes, and
    those of llama.cpp's models by `translation` as transformers has them. `folders` has the component of the keys
    that a pipeline has beside its model; only text encoders among them have `layers`.
    """

    path: Path
    files: Mapping[str, SafetensorsFile | GgufFile]
    prefix: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    translation: Translation = NATIVE
    folders: Mapping[str, str] = field(default_factory=dict)
    _norms: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    _room: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str, *, native: bool = False) -> Checkpoint:
        """Read the headers; llama.cpp's models stay as they are with `native`.

        Raises:
            LoraFileError: nothing readable there, a shard is missing, or two files have the same tensor.
        """
        path = Path(path)
        files: dict[str, SafetensorsFile | GgufFile] = {}
        folders: dict[str, str] = {}
        beside = [(folder, file) for folder in components(path) for file in of_component(folder)]
        for folder, file in (*((None, opened(each)) for each in weight_files(path)), *beside):
            twice = next((key for key in file.keys if key in files), None)
            if twice is not None:
                raise LoraFileError(path, f"is in {files[twice].path.name} and {file.path.name}", key=printable(twice))
            files.update(dict.fromkeys(file.keys, file))
            folders.update(dict.fromkeys(file.keys, folder.name) if folder else {})
        if not files:
            raise LoraFileError(path, "holds no tensor")
        first = next(iter(files.values()))
        known = translation(first) if isinstance(first, GgufFile) and not native else NATIVE
        prefix = shared_prefix([known.names.get(key, key) for key in files if key.endswith(_WEIGHT)])
        return cls(path, files, prefix, config_beside(first.path), known, folders)

    @cached_property
    def promised(self) -> frozenset[str]:
        """The components that a pipeline says it has, but those that are pickles; empty for a model alone."""
        return frozenset(listed(self.path)) - self.pickled

    @cached_property
    def pickled(self) -> frozenset[str]:
        """The components of a pipeline whose weights are pickles alone, which are never opened."""
        folders = {name: self.path / name for name in listed(self.path)}
        files = {name: [file.suffix for file in folder.glob("*")] for name, folder in folders.items()}
        return frozenset(
            name for name, ends in files.items() if set(ends) & set(PICKLES) and ".safetensors" not in ends
        )

    def _called(self, key: str) -> str:
        """Return the name of a tensor of the file."""
        return self.translation.names.get(key, key).removeprefix(self.prefix)

    def prefix_of(self, name: str) -> str:
        """Return the prefix that a tensor has in the file: text encoders beside a denoiser do not have that of it."""
        key = self.names.get(name)
        return self.prefix if key is None or self._called(key) != self.translation.names.get(key, key) else ""

    @cached_property
    def names(self) -> dict[str, str]:
        """Every tensor by its name without the prefix, and the weight of a layer whose codes have another name."""
        own = {self._called(key): key for key in self.files}
        return {name: scheme.owned[0] for name, scheme in self.schemes.items()} | own

    @cached_property
    def schemes(self) -> dict[str, StorageScheme]:
        """How the weights that are quantised are stored, by name.

        Raises:
            LoraFileError: what the file says of one of them cannot be read.
        """
        files = self.files  # not `self`: a cycle would keep its files open
        infos = {key: file.tensors[key] for key, file in files.items()}
        try:
            found = schemes(Tensors(infos, lambda key, start, stop: files[key].rows(key, start, stop), self.config))
        except ValueError as error:
            raise LoraFileError(self.path, printable(error)) from error
        for key, file in files.items():
            if isinstance(file, GgufFile) and (packed := scheme(file, key, self.translation)):
                found[key] = packed
        return {self._called(key): one for key, one in found.items()}

    @cached_property
    def owned(self) -> frozenset[str]:
        """Tensors that belong to a quantised layer, such as scales, or to none: all but the weights' own names."""
        parts = {self._called(key) for scheme in self.schemes.values() for key in scheme.owned}
        return frozenset(parts | idle(self.files)) - self.schemes.keys()

    @cached_property
    def layers(self) -> dict[str, str]:
        """The weight of every layer, by the layer's name with the prefix; llama.cpp's names as transformers has them.

        Raises:
            LoraFileError: no tensor is the weight of a layer.
        """
        own = {key: file for key, file in self.files.items() if self.folders.get(key, _ENCODER).startswith(_ENCODER)}
        found = {key: layer_of(key, len(file.tensors[key].shape)) for key, file in own.items()}
        layers = {layer: self._called(key) for key, layer in found.items() if layer is not None}
        known = set(layers.values())
        layers |= {self.prefix + name.removesuffix(_WEIGHT): name for name in self.schemes if name not in known}
        if not layers:
            raise LoraFileError(self.path, "holds no weight of a layer")
        return {self._names.get(layer, layer): weight for layer, weight in layers.items()}

    @cached_property
    def _names(self) -> dict[str, str]:
        """The names in transformers of layers that llama.cpp gave others."""
        file = next(iter(self.files.values()))
        ends = [key.removesuffix(_WEIGHT) for key in self.files]
        return model_names(file, ends) if isinstance(file, GgufFile) else {}

    @property
    def shapes(self) -> dict[str, Shape | None]:
        """The shape of every layer by its name with the prefix; None where codes are stored that are no weights."""
        return {layer: self._shape(weight) for layer, weight in self.layers.items()}

    def _shape(self, name: str) -> Shape | None:
        """Return the shape of a weight, as far as it is known."""
        info = self.info(name)
        return info.shape or None if name in self.schemes or is_float(info.dtype) else None

    def place(self, adapter: LoraAdapter) -> Placement:
        """Return where every module of the adapter goes; the layers of slots are keys of `layers`."""
        if adapter.format != "gguf" or not self._names:
            return place(adapter, self.shapes, self.config)
        own = {new: old for old, new in self._names.items()}
        placed = place(adapter, {own.get(layer, layer): shape for layer, shape in self.shapes.items()})
        slots = {
            module: tuple(slot._replace(layer=self._names.get(slot.layer, slot.layer)) for slot in some)
            for module, some in placed.slots.items()
        }
        return replace(placed, slots=slots)

    def match(self, adapter: LoraAdapter) -> dict[str, str]:
        """Return {module of the adapter: name of the weight}."""
        return {module: self.layers[found.layer] for module, found in match_layers(adapter, self.layers).items()}

    def quantised(self, name: str) -> str | None:
        """Name how a weight is stored, None when its numbers are the weights."""
        return self.schemes[name].name if name in self.schemes else None

    def unreadable(self, name: str) -> str | None:
        """Say why the real weight cannot be had; None when it can."""
        scheme = self.schemes.get(name)
        if scheme:
            return scheme.why or None
        kind = self.info(name).dtype
        return None if is_float(kind) else f"{torch_name(kind)} codes without a scale"

    def stored(self, name: str) -> TensorInfo:
        """Return what the header says of a tensor of the file."""
        key = self.names[name]
        return self.files[key].tensors[key]

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of a weight, with the shape of the real one where it is quantised."""
        scheme = self.schemes.get(name)
        if scheme is None:
            return self.stored(name)
        return self.stored(name if name in self.names else scheme.owned[0].removeprefix(self.prefix))._replace(
            shape=scheme.shape
        )

    def dtype(self, name: str) -> str:
        """Return the dtype of what is stored as torch names it; unknown ones as the file does."""
        return torch_name(self.info(name).dtype)

    def stored_rows(self, name: str, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Return rows [start, stop) of a tensor, as stored, flattened to two dimensions; in `room` if given.

        Raises:
            LoraFileError: the file changed since its header was read, or this torch does not know its dtype.
        """
        key = self.names[name]
        file = self.files[key]
        part = self.translation.rows(key, lambda first, last: file.rows(key, first, last, room), start, stop)
        return part.flatten(1) if part.dim() > 1 else part.reshape(-1, 1)

    def rows(self, name: str, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Return rows [start, stop) of a weight in two dimensions: as stored, or float32 where it is quantised.

        Raises:
            LoraFileError: as `stored_rows`, or the real weight cannot be had.
        """
        scheme = self.schemes.get(name)
        if scheme is None:
            return self.stored_rows(name, start, stop, room)
        if scheme.rows is None:
            raise LoraFileError(self.path, scheme.why, key=printable(name))
        return scheme.rows(start, min(stop, (*scheme.shape, 1)[0]))

    def matrix_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a weight, or of the matrices that a parameter of three dimensions stacks, one below the other.

        Raises:
            LoraFileError: as `rows`.
        """
        shape = self.info(name).shape
        if len(shape) != 3:
            return self.rows(name, start, stop)
        height, first = shape[1], start // shape[1]
        whole = self.rows(name, first, -(-stop // height)).reshape(-1, shape[2])
        return whole[start - first * height : stop - first * height]

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
            step = max(1, _NORM_ELEMENTS * rows // max(info.elements, 1))
            read = self.chunks(name)
            parts = (read(start, start + step) for start in range(0, rows, step))
            wide = (part if part.dtype.itemsize > 1 else part.float() for part in parts)
            norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in wide]
            self._norms[name] = math.hypot(*norms)
        return self._norms[name]
