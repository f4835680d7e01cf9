"""One number from its bytes, for every dtype in which trainers have stored alpha."""

from __future__ import annotations

import math
import struct

_CODES = {
    "F64": "d", "F32": "f", "F16": "e",
    "I64": "q", "I32": "i", "I16": "h", "I8": "b",
    "U64": "Q", "U32": "I", "U16": "H", "U8": "B",
}  # fmt: skip
_STRUCT = {dtype: struct.Struct(f"<{code}") for dtype, code in _CODES.items()}
_EIGHT_BITS = {"F8_E4M3": (4, 7), "F8_E5M2": (5, 15)}  # exponent bits, bias
FLOATS = frozenset({"F64", "F32", "F16", "BF16", *_EIGHT_BITS})


def is_float(dtype: str) -> bool:
    """Tell whether a tensor of this dtype holds weights; `Q8_0` and its like are ggml's quantised floats."""
    return dtype in FLOATS or dtype.startswith(("Q", "IQ", "TQ"))


def problem(dtype: str, elements: int) -> str | None:
    """Say why a tensor holds no single number, or None when it does."""
    if elements != 1:
        return f"has {elements} elements, one number is needed"
    if dtype not in FLOATS and dtype not in _STRUCT:
        return f"has dtype {dtype}, a number is needed"
    return None


def decode(dtype: str, raw: bytes) -> float:
    """Return the little-endian number in `raw`; `problem` said that `dtype` holds one."""
    if dtype in _STRUCT:
        return float(_STRUCT[dtype].unpack(raw)[0])
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return _eight_bits(raw[0], *_EIGHT_BITS[dtype])


def _eight_bits(byte: int, exponent_bits: int, bias: int) -> float:
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte & 0x7F) >> mantissa_bits
    mantissa = byte & ((1 << mantissa_bits) - 1)
    if byte & 0x7F == 0x7F or (exponent_bits == 5 and exponent == 31 and mantissa):
        return math.nan
    if exponent_bits == 5 and exponent == 31:
        return sign * math.inf
    fraction = mantissa / (1 << mantissa_bits)
    return sign * ((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
