"""A GGUF adapter (llama.cpp), read and written through the `gguf` package, which is imported only for such files."""

from __future__ import annotations

import re
import secrets
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LoraFileError
from harness.files.tensor_file import MAX_TENSORS, TensorFile, TensorInfo, regular_size, set_apart
from harness.text import printable

if TYPE_CHECKING:
    from torch import Tensor

ALPHA_KEY = "adapter.lora.alpha"
ARCHITECTURE_KEY = "general.architecture"
_MAGIC = b"GGUF"
_ARRAY = 9  # GGUFValueType.ARRAY
_MAX_HEADER_BYTES = 25_000_000
_LONGEST_ARRAY = 65_536  # vocabularies, which only whole models have, cost the reader seconds
_LONGEST_VOCABULARY = 2_000_000
_BLOCK = re.compile(r"blk\.(\d{1,4})\.")
_MOST_BLOCKS = 512
_MODERN = ("model.layers.", "model.", "lm_head", "transformer.h.")
_OWN: Mapping[tuple[str, str], str] = {
    ("phi2", "attn_output"): "self_attn.dense",
    ("phi2", "ffn_up"): "mlp.fc1",
    ("phi2", "ffn_down"): "mlp.fc2",
    ("phi3", "attn_qkv"): "self_attn.qkv_proj",
    ("phi3", "ffn_up"): "mlp.gate_up_proj",
    ("gemma2", "ffn_up"): "mlp.up_proj",
    ("gemma3", "ffn_up"): "mlp.up_proj",
}  # layers of a model whose first name in the package is that of another
_OLDER = frozenset({"bloom", "codeshell", "falcon", "gpt2", "gptj", "jais", "mpt", "starcoder"})  # transformer.h.
_PLAIN = ("F16", "F32", "F64")
_REFUSED = (ValueError, LookupError, ArithmeticError, RecursionError, MemoryError, OSError, TypeError)


# type -> bytes of a block, and (first byte, end, the byte that holds a code of 1 in each place) of its codes
Codes = tuple[int, tuple[tuple[int, int, int], ...]]
_CODES: Mapping[str, Codes] = {
    "Q4_0": (18, ((2, 18, 0x11),)), "Q4_1": (20, ((4, 20, 0x11),)), "Q8_0": (34, ((2, 34, 1),)),
    "Q5_0": (22, ((2, 6, 0), (6, 22, 0x11))), "Q5_1": (24, ((4, 8, 0), (8, 24, 0x11))),
    "Q2_K": (84, ((16, 80, 0x55),)), "Q3_K": (110, ((0, 32, 0), (32, 96, 0x55))), "Q4_K": (144, ((16, 144, 0x11),)),
    "Q5_K": (176, ((16, 48, 0), (48, 176, 0x11))), "Q6_K": (210, ((0, 128, 0x11), (128, 192, 0))),
}  # fmt: skip


class GgufFile(TensorFile):
    """The header of one GGUF file; shapes are in torch's order, the reverse of ggml's."""

    def tensor(self, key: str) -> Tensor:
        """Return one tensor: float types as stored, quantised ones as float32.

        Raises:
            LoraFileError: the file changed, or its type is unknown to `gguf`.
        """
        shape = self.tensors[key].shape
        rows = self.rows(key, 0, shape[0] if shape else 1)
        return rows if shape else rows.reshape(())

    def rows(self, key: str, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Return rows [start, stop) of a tensor as `tensor` does; a number is one row. `room` is not used.

        Raises:
            LoraFileError: the file changed, or its type is unknown to `gguf`.
        """
        try:
            return _decoded(self, self._layouts[key], start, stop)
        except _REFUSED as error:
            raise LoraFileError(self.path, f"cannot be read ({printable(error)})", key=printable(key)) from error

    def has_grid(self, key: str) -> bool:
        """Tell whether the numbers of a tensor are whole numbers of steps; those of types with a codebook are not."""
        return self.tensors[key].dtype in _CODES

    def grid(self, key: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return step and offset of each weight of rows [start, stop): [rows, in] in float32 each.

        Raises:
            LoraFileError: as `rows`.
        """
        codes = _CODES[self.tensors[key].dtype]
        try:
            low, high = (_decoded(self, self._layouts[key], start, stop, (codes, one)) for one in (False, True))
        except _REFUSED as error:
            raise LoraFileError(self.path, f"cannot be read ({printable(error)})", key=printable(key)) from error
        return high - low, low

    @cached_property
    def _layouts(self) -> dict[str, Any]:
        """How the numbers of every tensor lie: their dtype, byte order and shape for numpy."""
        return {tensor.name: tensor for tensor in _reader(self.path, self.size, model=True).tensors}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the header of `gguf`, which can be read again, behind too."""
        return {name: value for name, value in super().__getstate__().items() if name != "_layouts"}


def is_gguf(path: Path) -> bool:
    """Tell whether `path` is a regular file that begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb", buffering=0) as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def read_gguf(path: Path, *, model: bool = False) -> GgufFile:
    """Read the header of a GGUF file: an adapter, or with `model` a whole model, whose vocabulary takes seconds.

    Raises:
        LoraFileError: `gguf` is not installed, or the file is malformed or (without `model`) a whole model.
    """
    size = regular_size(path)
    reader = _reader(path, size, model=model)
    tensors = {tensor.name: _info(tensor) for tensor in reader.tensors}
    for name, info in tensors.items():
        if not reader.data_offset <= info.start <= info.end <= size:
            raise LoraFileError(path, "lies outside the file", key=printable(name))
    return GgufFile(path, dict(sorted(tensors.items(), key=lambda item: item[1].start)), _metadata(path, reader), size)


def model_names(file: GgufFile, layers: Iterable[str]) -> dict[str, str]:
    """Return {layer of a whole model: its name in transformers}, as far as `gguf` knows the architecture."""
    gguf = _package(file.path)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = kinds.get(file.metadata.get("general.architecture", ""))
    if kind is None:
        return {}
    blocks = 1 + max((int(found[1]) for key in file.keys if (found := _BLOCK.match(key))), default=0)
    spellings: dict[str, list[str]] = {}
    for spelling, (_, name) in gguf.get_tensor_name_map(kind, min(blocks, _MOST_BLOCKS)).mapping.items():
        spellings.setdefault(name, []).append(spelling)
    starts = _MODERN[::-1] if file.metadata.get("general.architecture") in _OLDER else _MODERN
    known = [layer for layer in layers if layer in spellings]
    named = {
        layer: next((n for start in starts for n in spellings[layer] if n.startswith(start)), layer) for layer in known
    }
    for layer in known:
        own = _OWN.get((file.metadata["general.architecture"], layer.rpartition(".")[2]))
        if own and (block := _BLOCK.match(layer)):
            named[layer] = f"model.layers.{block[1]}.{own}"
    if "output" in named and starts == _MODERN:  # not `model.transformer.ff_out`, as LLaDA has it
        named["output"] = "lm_head"
    return named


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


def _reader(path: Path, size: int, *, model: bool) -> Any:
    gguf, longest = _package(path), _LONGEST_VOCABULARY if model else _LONGEST_ARRAY

    class Bounded(gguf.GGUFReader):  # type: ignore[name-defined,misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            length = int.from_bytes(bytes(self.data[orig_offs + 4 : orig_offs + 12]), "little")
            if raw_type == _ARRAY and length > longest:
                raise ValueError(f"an array of {length:,} values, which no {'model' if model else 'adapter'} has")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            if count > MAX_TENSORS:
                raise ValueError(f"{count:,} tensors, at most {MAX_TENSORS:,} are read")
            return super()._build_tensor_info(offs, count)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of overflows in hostile offsets, which are refused later
            reader = _of_header(path, size, Bounded)
    except _REFUSED as error:
        raise LoraFileError(path, f"not a valid GGUF adapter ({printable(error)})") from error

    if reader.data_offset > _MAX_HEADER_BYTES:
        raise LoraFileError(path, f"a header of more than {_MAX_HEADER_BYTES:,} bytes, which no adapter has")
    return reader


def _of_header(path: Path, size: int, reader: type) -> Any:
    """Let the reader, which maps what it opens, open a copy of all that it looks at: of tensors it tells the places."""
    with path.open("rb") as stream:
        head = stream.read(min(size, _MAX_HEADER_BYTES))
    with set_apart(path, head, size) as apart:
        return reader(apart)


def _package(path: Path) -> Any:
    try:
        return import_module("gguf")
    except ImportError:
        raise LoraFileError(path, "is a GGUF file: install `gguf` to have it read (lora-harness[gguf])") from None


def _decoded(file: GgufFile, tensor: Any, start: int, stop: int, codes: tuple[Codes, bool] | None = None) -> Tensor:
    """Return rows of a tensor; with `codes` as if all of them were 0, or 1."""
    import torch

    name, stored = tensor.tensor_type.name, tensor.data.dtype
    count, *rest = tensor.data.shape or (1,)
    start, stop = min(start, count), min(stop, count)
    width = int(tensor.data.nbytes) // max(count, 1)
    raw = file.elements(int(tensor.data_offset) + start * width, (stop - start) * width, torch.uint8).numpy()
    if codes:
        raw = _with_codes(raw, *codes)
    native = raw.view(stored).astype(stored.newbyteorder("="), copy=False).reshape(stop - start, *rest)
    if name in _PLAIN:
        return torch.from_numpy(native)
    if name == "BF16":
        return torch.from_numpy(native).view(torch.bfloat16)
    return torch.from_numpy(import_module("gguf.quants").dequantize(native, tensor.tensor_type).copy())


def _with_codes(raw: Any, layout: Codes, one: bool) -> Any:
    """Return blocks whose codes are all 0, or 1."""
    size, places = layout
    blocks = raw.reshape(-1, size).copy()
    for first, end, byte in places:
        blocks[:, first:end] = byte if one else 0
    return blocks.reshape(-1)


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
