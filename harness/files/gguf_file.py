"""A GGUF adapter (llama.cpp), read and written through the `gguf` package, which is imported only for such files."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LoraFileError
from harness.files.tensor_file import MAX_TENSORS, TensorFile, TensorInfo, regular_size
from harness.text import printable

if TYPE_CHECKING:
    from torch import Tensor

ALPHA_KEY = "adapter.lora.alpha"
ARCHITECTURE_KEY = "general.architecture"
_MAGIC = b"GGUF"
_ARRAY = 9  # GGUFValueType.ARRAY
_LONGEST_ARRAY = 65_536  # vocabularies, which only whole models have, cost the reader seconds
_PLAIN = ("F16", "F32", "F64")
_REFUSED = (ValueError, LookupError, ArithmeticError, RecursionError, MemoryError, OSError, TypeError)


class GgufFile(TensorFile):
    """The header of one GGUF file; shapes are in torch's order, the reverse of ggml's."""

    def tensor(self, key: str) -> Tensor:
        """Return one tensor: float types as stored, quantised ones as float32.

        Raises:
            LoraFileError: the file changed, or its type is unknown to `gguf`.
        """
        if not self._opened:
            self._opened.append({tensor.name: tensor for tensor in _reader(self.path).tensors})
        try:
            return _decoded(self._opened[0][key])
        except _REFUSED as error:
            raise LoraFileError(self.path, f"cannot be read ({printable(error)})", key=printable(key)) from error


def is_gguf(path: Path) -> bool:
    """Tell whether `path` is a regular file that begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb", buffering=0) as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        LoraFileError: `gguf` is not installed, or the file is malformed or a whole model.
    """
    size = regular_size(path)
    reader = _reader(path)
    tensors = {tensor.name: _info(tensor) for tensor in reader.tensors}
    for name, info in tensors.items():
        if not reader.data_offset <= info.start <= info.end <= size:
            raise LoraFileError(path, "lies outside the file", key=printable(name))
    return GgufFile(path, dict(sorted(tensors.items(), key=lambda item: item[1].start)), _metadata(path, reader), size)


def _metadata(path: Path, reader: Any) -> dict[str, str]:
    """Return every key-value that is one value, as text."""
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    try:
        return {name: str(field.contents()) for name, field in fields.items() if field.types[:1] != [_ARRAY]}
    except _REFUSED as error:
        raise LoraFileError(path, f"not a valid GGUF adapter ({printable(error)})") from error


def _info(tensor: Any) -> TensorInfo:
    start = int(tensor.data_offset)
    shape = tuple(int(length) for length in reversed(tensor.shape))
    return TensorInfo(tensor.tensor_type.name, shape, start, start + int(tensor.n_bytes))


def _reader(path: Path) -> Any:
    gguf = _package(path)

    class Bounded(gguf.GGUFReader):  # type: ignore[name-defined,misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            length = int.from_bytes(bytes(self.data[orig_offs + 4 : orig_offs + 12]), "little")
            if raw_type == _ARRAY and length > _LONGEST_ARRAY:
                raise ValueError(f"an array of {length:,} values, which no adapter has")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            if count > MAX_TENSORS:
                raise ValueError(f"{count:,} tensors, at most {MAX_TENSORS:,} are read")
            return super()._build_tensor_info(offs, count)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of overflows in hostile offsets, which are refused later
            return Bounded(path)
    except _REFUSED as error:
        raise LoraFileError(path, f"not a valid GGUF adapter ({printable(error)})") from error


def _package(path: Path) -> Any:
    try:
        return import_module("gguf")
    except ImportError:
        raise LoraFileError(path, "is a GGUF file: install `gguf` to have it read (lora-harness[gguf])") from None


def _decoded(tensor: Any) -> Tensor:
    import numpy
    import torch

    name = tensor.tensor_type.name
    native = numpy.array(tensor.data, dtype=tensor.data.dtype.newbyteorder("="))
    if name in _PLAIN:
        return torch.from_numpy(native)
    if name == "BF16":
        return torch.from_numpy(native).view(torch.bfloat16)
    return torch.from_numpy(import_module("gguf.quants").dequantize(native, tensor.tensor_type).copy())


def write_gguf(path: Path, tensors: Mapping[str, Tensor], alpha: float | None, architecture: str = "llama") -> None:
    """Write the halves and one alpha (None: no such key, which llama.cpp takes as scale 1) as an adapter.

    Raises:
        LoraFileError: `gguf` is not installed.
        ValueError: a dtype that GGUF does not have.
    """
    gguf = _package(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    writer = gguf.GGUFWriter(temporary, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32(ALPHA_KEY, alpha)
    for key, tensor in tensors.items():
        writer.add_tensor(key, *_encoded(gguf, tensor))
    try:
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encoded(gguf: Any, tensor: Tensor) -> tuple[Any, ...]:
    """Return the arguments of `add_tensor` after the name: array, raw shape, raw type."""
    import torch

    plain = tensor.detach().to("cpu").contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.uint8).numpy(), None, gguf.GGMLQuantizationType.BF16
    if plain.dtype not in (torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype={tensor.dtype} is not written to GGUF")
    return (plain.numpy(),)
