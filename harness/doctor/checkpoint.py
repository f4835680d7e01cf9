"""A model's weights on disk: a safetensors or GGUF file, a folder, or shards with an index; rows only on demand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.doctor.llama_cpp import NATIVE, Translation, scheme, translation
from harness.doctor.match import Placement, match_layers, place
from harness.doctor.quantised import StorageScheme, Tensors, idle, schemes
from harness.doctor.spelling import layer_of, shared_prefix
from harness.errors import LoraFileError
from harness.files import LoraAdapter, SafetensorsFile, TensorInfo, read_header
from harness.files.architectures import Shape
from harness.files.gguf_file import GgufFile, is_gguf, model_names, read_gguf
from harness.files.safetensors_file import torch_name
from harness.files.tensor_file import is_float
from harness.text import parse_json, printable

_INDEX = ".safetensors.index.json"
_PIPELINE = "model_index.json"
_WEIGHT = ".weight"
_NORM_ELEMENTS = 1 << 21
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MODEL_FOLDERS = ("transformer", "unet")
_COMPONENT = re.compile(r"(?:text_encoder|vae|image_encoder|transformer|unet)(?:_\d)?")
_ENCODER = "text_encoder"  # how the folders of text encoders begin, beside a pipeline's model
_SHARD = re.compile(r"(.+-)(\d{1,9})(-of-(\d{1,6})\.safetensors)")
_VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)(?=[.-])")  # in the names of a component's other files
_MAX_INDEX_BYTES = 50_000_000


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
        beside = [(folder, file) for folder in _components(path) for file in _of_component(folder)]
        for folder, file in (*((None, _opened(each)) for each in _weight_files(path)), *beside):
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
        return cls(path, files, prefix, _config_beside(first.path), known, folders)

    @cached_property
    def promised(self) -> frozenset[str]:
        """The components that a pipeline says it has, but those that are pickles; empty for a model alone."""
        return frozenset(_listed(self.path)) - self.pickled

    @cached_property
    def pickled(self) -> frozenset[str]:
        """The components of a pipeline whose weights are pickles alone, which are never opened."""
        folders = {name: self.path / name for name in _listed(self.path)}
        files = {name: [file.suffix for file in folder.glob("*")] for name, folder in folders.items()}
        return frozenset(
            name for name, ends in files.items() if set(ends) & set(_PICKLES) and ".safetensors" not in ends
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


def _opened(path: Path) -> SafetensorsFile | GgufFile:
    return read_gguf(path, model=True) if is_gguf(path) else read_header(path)


def _config_beside(path: Path) -> dict[str, Any]:
    """Return the model's config.json, empty when there is none or it cannot be read: only quantisation needs it."""
    return _json_in(path.parent / "config.json")


def _json_in(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds, empty when there is none or it cannot be read."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _weight_files(path: Path) -> Iterator[Path]:
    """Yield the safetensors files that make up a checkpoint."""
    if path.name.endswith(_INDEX):
        return iter(_shards(path))
    if not path.is_dir():
        return iter([path])
    models = [path / name for name in _MODEL_FOLDERS if (path / name).is_dir()]
    if models and _is_pipeline(path):
        return _weight_files(models[0])
    if found := _in_folder(path):
        return iter(found)
    if not models:
        pickled = next((one.name for one in sorted(path.iterdir()) if one.suffix in _PICKLES), None)
        what = f"; {printable(pickled, 60)} is a pickle, which can run code when opened" if pickled else ""
        raise LoraFileError(path, f"a folder without safetensors files, the weights of a model are needed{what}")
    return _weight_files(models[0])


def _is_pipeline(path: Path) -> bool:
    """Tell whether a folder says that its models lie in folders of their own, whatever else lies beside them."""
    return (path / _PIPELINE).is_file()


def _listed(path: Path) -> list[str]:
    """Return the components that a pipeline's folder lists, or those of a folder that lists none, by their usual names.

    Empty for other paths.
    """
    if not path.is_dir():
        return []
    if _is_pipeline(path):
        found = _json_in(path / _PIPELINE).items()
        return [name for name, what in found if isinstance(what, list) and all(what) and Path(name).name == name]
    return [part.name for part in sorted(path.glob("*")) if part.is_dir() and _COMPONENT.fullmatch(part.name)]


def _components(path: Path) -> list[Path]:
    """Return the folders with weights that a pipeline's folder has beside its model."""
    if (
        not path.is_dir()
        or (any(path.glob("*.safetensors")) and not _is_pipeline(path))
        or not any((path / name).is_dir() for name in _MODEL_FOLDERS)
    ):
        return []
    model = next(name for name in _MODEL_FOLDERS if (path / name).is_dir())
    folders = (path / name for name in _listed(path) if name != model)
    return [folder for folder in folders if any(folder.glob("*.safetensors"))]


def _of_component(folder: Path) -> Iterator[SafetensorsFile]:
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
