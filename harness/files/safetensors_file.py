"""A safetensors file opened safely: bounded, validated by safetensors itself, tensors only on demand."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LoraFileError, NoLoraError
from harness.files.header_rules import refusal
from harness.files.tensor_file import CUT, MAX_TENSORS, TensorFile, TensorInfo, os_problem, regular_size, set_apart
from harness.text import printable

_IN_BROWSER = sys.platform == "emscripten"
if not _IN_BROWSER:
    from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 25_000_000  # a 47 MB header of empty tensors costs safetensors 8 to 25 s and more than 1 GB
_LENGTH_BYTES = 8
_SHOWN_BYTES = 120
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_DESCRIPTORS = "/dev/fd"
_METADATA_FIRST = re.compile(rb'\s*\{\s*"__metadata__"\s*:\s*')
_DECODER = json.JSONDecoder()
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_TORCH = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "C64": "complex64",
}  # fmt: skip
_ZIP = b"PK\x03\x04"
_MAGIC = {
    _ZIP: "is a zip archive: unpack it first",
    b"\x80\x02": "is a Python pickle, which can run code when opened, so it is never opened here",
    b"GGUF": "is a GGUF file, a safetensors file is needed here",
    b"version ": "is a git-lfs pointer, not the weights: fetch them with `git lfs pull`",
    b"<!DOCTYP": "is a web page, not the weights: the download went wrong",
    b"<html": "is a web page, not the weights: the download went wrong",
}
_ZIPPED_PICKLE = b"/data.pkl"  # the first entry of what torch.save writes
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_CONVERT = "convert it in a sandbox: safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"


class SafetensorsFile(TensorFile):
    """The validated header of one safetensors file."""

    def tensor(self, key: str) -> torch.Tensor:
        """Return one tensor as stored (dtype, shape); needs torch.

        Raises:
            LoraFileError: the file changed or its dtype is unknown to this torch.
        """
        shape = self.tensors[key].shape
        rows = self.rows(key, 0, shape[0] if shape else 1)
        return rows if shape else rows.reshape(())

    def rows(self, key: str, start: int, stop: int, room: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows [start, stop) of a tensor as stored, a number is one row; in `room`, bytes enough, if given.

        Raises:
            LoraFileError: the file changed or its dtype is unknown to this torch.
        """
        import torch

        info = self.tensors[key]
        count, *rest = info.shape or (1,)
        start, stop = min(start, count), min(stop, count)
        width = (info.end - info.start) // max(count, 1)
        try:
            kind = getattr(torch, torch_name(info.dtype))
            flat = self.elements(info.start + start * width, (stop - start) * math.prod(rest), kind, room)
        except (OSError, AttributeError, RuntimeError, ValueError) as error:
            raise LoraFileError(self.path, f"cannot be read ({printable(error)})", key=printable(key)) from error
        return flat.reshape(stop - start, *rest)


def torch_name(dtype: str) -> str:
    """Return a dtype as torch names it; unknown ones as the file does."""
    return _TORCH.get(dtype, dtype)


def read_header(path: Path | str) -> SafetensorsFile:
    """Read and validate the header of a safetensors file; no tensor is read and torch is not imported.

    Raises:
        LoraFileError: one sentence with the path: missing, not a regular file, another kind of file, truncated,
            header too long, or anything safetensors itself refuses.
    """
    path = Path(path)
    size = regular_size(path)
    raw = _header_bytes(path, size)
    count = raw.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise LoraFileError(path, f"{count:,} tensors in the header, at most {MAX_TENSORS:,} are read")
    if _IN_BROWSER:
        if why := refusal(raw, size):
            raise LoraFileError(path, f"not a valid safetensors file ({printable(why)})")
        return _parsed(path, raw, size)
    handle = _validated(path, raw, size)
    return _listed(path, raw, size, handle) or _parsed(path, raw, size)


def _header_bytes(path: Path, size: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as stream:
            head = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(head, "little")
            if length > size - _LENGTH_BYTES:
                raise _other_kind(path, head + stream.read(_SHOWN_BYTES), size)
            if length > MAX_HEADER_BYTES:
                raise LoraFileError(path, f"a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
            raw = stream.read(length)
            if len(raw) < length:
                raise LoraFileError(path, CUT)
            return raw
    except OSError as error:
        raise LoraFileError(path, os_problem(error)) from error


def _other_kind(path: Path, head: bytes, size: int) -> LoraFileError:
    """Say what a file is whose first bytes are no possible header length."""
    saved_by_torch = _ZIPPED_PICKLE in head or path.suffix.lower() in _PICKLES
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            if magic == _ZIP and saved_by_torch:
                kind = "is a PyTorch pickle (zip), which can run code when opened, so it is never opened here"
            return LoraFileError(path, f"{kind}; {_CONVERT}") if "pickle" in kind else NoLoraError(path, kind)
    if path.name == "adapter_config.json":
        return LoraFileError(path, "is the configuration of an adapter: give the folder that it lies in")
    if path.suffix.lower() in _PICKLES:
        return LoraFileError(path, f"{path.suffix} files are pickles, which can run code when opened; {_CONVERT}")
    if size < _LENGTH_BYTES:
        return LoraFileError(path, f"empty or truncated: {size} bytes, a safetensors file has more")
    if text := _as_text(head):
        return NoLoraError(path, f"is text, not the weights: {text}")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    what = f"truncated or not a safetensors file: it announces a header of {length:,} bytes and has {size:,}"
    return LoraFileError(path, what)


def _as_text(head: bytes) -> str:
    """Return how a file of text begins, escaped; empty for other files."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # of the last character a part may be missing
    except UnicodeDecodeError:
        return ""
    return printable(" ".join(text.split()), _SHOWN_BYTES) if text.strip() and not _CONTROL.search(text) else ""


def _validated(path: Path, raw: bytes, size: int) -> Any:
    """Have safetensors, whose errors never name the file, open what was read of it.

    It maps what it opens, so it gets a file of its own; Windows lets nobody cut a file that is mapped.
    """
    try:
        if not os.path.isdir(_DESCRIPTORS):
            return safe_open(os.fspath(path), framework="np")
        with set_apart(path, len(raw).to_bytes(_LENGTH_BYTES, "little") + raw, size) as stream:
            return safe_open(f"{_DESCRIPTORS}/{stream.fileno()}", framework="np")
    except (SafetensorError, OSError, MemoryError, UnicodeError, ValueError) as error:
        reason = printable(error).removeprefix("Error while deserializing header: ")
        raise LoraFileError(path, f"not a valid safetensors file ({reason})") from error


def _listed(path: Path, raw: bytes, size: int, handle: Any) -> SafetensorsFile | None:
    """Return what safetensors says of the file, several times quicker than parsing the header once more.

    It tells no offsets: they follow from the order of the data, which has no gaps. None where that, or the order of
    names or metadata, cannot be told.
    """
    metadata = handle.metadata() or {}
    tensors = _in_data_order(handle, _LENGTH_BYTES + len(raw), size) if hasattr(handle, "offset_keys") else None
    if tensors is None or not _plainly_unique(raw, tensors, metadata):
        return None
    if len(metadata) > 1:  # safetensors forgets their order
        ordered = _leading_metadata(raw)
        if ordered != metadata:
            return None
        metadata = ordered
    return SafetensorsFile(path, tensors, metadata, size)


def _in_data_order(handle: Any, at: int, size: int) -> dict[str, TensorInfo] | None:
    """Return the tensors, the first at byte `at`; None when one is empty, of an unusual dtype, or `size` is not met."""
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    infos = {}
    for name in handle.offset_keys():
        part = handle.get_slice(name)
        kind = part.get_dtype(), (*part.get_shape(),)
        length = sizes.get(kind)
        if length is None:
            length = sizes[kind] = math.prod(kind[1]) * _BYTES.get(kind[0], 0)
        if not length:
            return None
        infos[name] = TensorInfo._make((*kind, at, at + length))
        at += length
    return infos if at == size else None


def _leading_metadata(raw: bytes) -> dict[str, str] | None:
    """Return the metadata in the order of the header; None when they do not come first, as they usually do."""
    if not (start := _METADATA_FIRST.match(raw)):
        return None
    try:
        return dict(_DECODER.raw_decode(raw.decode(), start.end())[0])
    except (ValueError, RecursionError):
        return None


def _parsed(path: Path, raw: bytes, size: int) -> SafetensorsFile:
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        duplicates = () if _plainly_unique(raw, header, metadata) else _duplicates(raw)
    except (ValueError, RecursionError) as error:  # validated before, so only when the file changes under our hands
        raise LoraFileError(path, f"the header cannot be parsed ({printable(error)})") from error
    return SafetensorsFile(path, _tensors(header, _LENGTH_BYTES + len(raw)), metadata, size, duplicates)


def _plainly_unique(raw: bytes, header: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Tell whether no name can stand twice: every colon of the header follows a name or lies in a text.

    False says nothing: a colon may be written as an escape, or follow a name that nobody reads.
    """
    texts = "".join((*header, *metadata, *metadata.values()))
    names = 4 * len(header) + (1 + len(metadata) if metadata else 0)
    return raw.count(b":") == names + texts.count(":") and b"\\u003" not in raw


def _duplicates(raw: bytes) -> tuple[str, ...]:
    found: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = Counter(name for name, _ in pairs)
        if len(names) != len(pairs):
            found.extend(name for name, times in names.items() if times > 1)
        return dict(pairs)

    json.loads(raw, object_pairs_hook=unique)
    return tuple(found)


def _tensors(header: Mapping[str, Any], base: int) -> dict[str, TensorInfo]:
    infos = {}
    for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = row["data_offsets"]
        infos[name] = TensorInfo(row["dtype"], tuple(row["shape"]), base + start, base + end)
    return infos
