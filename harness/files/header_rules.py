"""What safetensors refuses of a header, where the library itself cannot run: in WebAssembly.

Everywhere else the library judges; tests hold these rules against it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_LARGEST = 2**64
_DEEPEST = 128
_LENGTH_BYTES = 8
_FIELDS = ("dtype", "shape", "data_offsets")


def refusal(raw: bytes, size: int) -> str:
    """Return why safetensors would not open a file of `size` bytes with the header `raw`, empty when it would."""
    try:
        _check(_parsed(raw), size - _LENGTH_BYTES - len(raw))
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


def _parsed(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8")
    header = json.loads(text, object_pairs_hook=_Object, parse_constant=_no_json, parse_int=_number, parse_float=_float)
    if not isinstance(header, _Object):
        raise ValueError("the header is no object")
    _check_text(header)
    named = [value for name, value in header.pairs if name == "__metadata__"]
    if len(named) > 1 or (named and not _is_metadata(named[0])):
        raise ValueError("invalid metadata")
    return {name: value for name, value in header.pairs if name != "__metadata__"}


class _Object:
    """An object of JSON with its names as often as they stand there."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _no_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _number(text: str) -> int | float:
    """Return a whole number, or a float where it is none that fits into 64 bits."""
    value = int(text) if len(text) <= 20 else _LARGEST
    return value if not text.startswith("-") and value < _LARGEST else _float(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("number out of range")
    return value


def _check_text(value: Any, depth: int = 1) -> None:
    """Refuse half a surrogate pair, and what is nested too deeply."""
    if depth >= _DEEPEST:
        raise ValueError("recursion limit exceeded")
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, _Object):
        for name, each in value.pairs:
            name.encode("utf-8")
            _check_text(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check_text(each, depth + 1)


def _is_metadata(value: Any) -> bool:
    return value is None or (isinstance(value, _Object) and all(isinstance(text, str) for _, text in value.pairs))


def _check(tensors: Mapping[str, Any], length: int) -> None:
    """Refuse tensors that do not fill `length` bytes one after the other, each with what its shape takes."""
    at = 0
    for (start, end), name, bits in sorted(_tensor(name, value) for name, value in tensors.items()):
        if start != at or end < start:
            raise ValueError(f"invalid offset for tensor {name}")
        if bits % 8:
            raise ValueError(f"tensor {name} ends within a byte")
        if bits // 8 != end - start:
            raise ValueError(f"invalid shape, data type, or offset for tensor {name}")
        at = end
    if at != length:
        raise ValueError("incomplete metadata, file not fully covered")


def _tensor(name: str, value: Any) -> tuple[tuple[int, int], str, int]:
    """Return the offsets, the name and the bits of a tensor."""
    fields = dict(value.pairs) if isinstance(value, _Object) else {}
    if not all(sum(key == field for key, _ in value.pairs) == 1 for field in _FIELDS if fields) or not fields:
        raise ValueError(f"tensor {name} has not one dtype, shape and data_offsets")
    dtype, shape, offsets = (fields[field] for field in _FIELDS)
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"unknown dtype of tensor {name}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"shape or offsets of tensor {name} are no sizes")
    if _overflows(shape, _BITS[dtype]):
        raise ValueError(f"overflow computing buffer size of tensor {name}")
    return (offsets[0], offsets[1]), name, math.prod(shape) * _BITS[dtype]


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _overflows(shape: list[int], bits: int) -> bool:
    product = 1
    for size in [*shape, bits]:
        product *= size
        if product >= _LARGEST:
            return True
    return False
