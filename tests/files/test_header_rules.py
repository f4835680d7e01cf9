"""What this package refuses of a header where safetensors cannot run is what safetensors refuses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
from packaging.version import Version
from safetensors import SafetensorError, safe_open

from harness.files.header_rules import refusal

pytestmark = pytest.mark.skipif(
    Version(safetensors.__version__) < Version("0.8"), reason="the rules are those of safetensors 0.8"
)
SIZES = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "F4": 4, "BOOL": 8, "I64": 64, "F8_E4M3": 8, "F6_E2M3": 6}
ODD: tuple[Any, ...] = (
    None, True, 1, -1, 1.0, "x", [], {}, [1, 2], 2**64, 2**64 - 1, -0.0, [0.0, 4], [True, 2], {"a": None}, "F32", "f32",
    "XX", [0, 0, 0], [2**63, 2],
)  # fmt: skip
SPLICED = (
    b'"', b"{", b"}", b"[", b"]", b",", b"\\ud800", b"\\u0041", b"\\ud83d\\ude00", b"1e5", b"1e999", b"NaN",
    b"Infinity",
    b"-0", b"00", b" ", b"null", b'"a":1,', b'"dtype":"F32",', b"\x00", b"\xef\xbb\xbf", b"\xff", b"9" * 400, b"\n",
)  # fmt: skip
DEPTHS = (100, 122, 123, 124, 125, 126, 127, 128, 129, 500, 100_000)


def library(path: Path, raw: bytes, size: int) -> str:
    """Return why safetensors itself refuses a file."""
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(size)
    try:
        with safe_open(str(path), framework="np"):
            return ""
    except (SafetensorError, OSError, MemoryError, UnicodeError, ValueError) as error:
        return str(error) or "refused"


def header(draw: random.Random) -> tuple[dict[str, Any], int]:
    """Return a valid header, and how many bytes of data it describes."""
    found: dict[str, Any] = {"__metadata__": {"k": "v", "r": "8"}} if draw.random() < 0.4 else {}
    at = 0
    for number in range(draw.randrange(4)):
        dtype, shape = draw.choice(list(SIZES)), [draw.randrange(5) for _ in range(draw.randrange(3))]
        end = at + math.prod(shape) * SIZES[dtype] // 8
        name = f"{draw.choice(('a', 'lora_A.weight', 'ü', 'x y', '__metadata__', chr(92) + 'n'))}{number}"
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return found, at


def changed(draw: random.Random, found: dict[str, Any]) -> None:
    """Put something odd into a header."""
    if not found:
        return
    name = draw.choice(list(found))
    row = found[name]
    if not isinstance(row, dict) or not row or draw.random() < 0.2:
        found[name] = draw.choice(ODD)
        return
    key = draw.choice([*row, "extra"])
    if draw.random() < 0.2:
        row.pop(key, None)
    else:
        row[key] = draw.choice(ODD)


def spliced(draw: random.Random, raw: bytes) -> bytes:
    """Change bytes of a header."""
    found = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(found) + 1)
        if draw.random() < 0.3:
            del found[at : at + draw.randrange(1, 4)]
        else:
            found[at:at] = draw.choice(SPLICED)
    return bytes(found)


@pytest.mark.parametrize("seed", range(4))
def test_headers_are_refused_as_safetensors_does(seed: int, tmp_path: Path) -> None:
    draw, valid = random.Random(seed), 0
    for _ in range(1500):
        found, length = header(draw)
        for _ in range(draw.choice((0, 0, 1, 1, 2))):
            changed(draw, found)
        raw = json.dumps(found, ensure_ascii=draw.random() < 0.5).encode()
        raw = spliced(draw, raw) if draw.random() < 0.4 else raw
        raw += draw.choice((b"", b"", b"", b" ", b"   ", b"\n", b"x", b"{}", b"\x00"))
        size = 8 + len(raw) + max(0, length + draw.choice((0, 0, 0, 0, 1, -1, 100)))
        theirs, ours = library(tmp_path / "x", raw, size), refusal(raw, size)
        assert bool(theirs) == bool(ours), (theirs, ours, raw, size)
        valid += not theirs
    assert 150 < valid < 900  # both are tried


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_is_refused_where_safetensors_refuses_it(depth: int, tmp_path: Path) -> None:
    deep = b"[" * depth + b"]" * depth
    for raw in (
        b'{"a":' + deep + b"}",
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":' + deep + b"}}",
        deep,
    ):
        size = 9 + len(raw)
        theirs, ours = library(tmp_path / "x", raw, size), refusal(raw, size)
        assert bool(theirs) == bool(ours), (theirs, ours, depth)


@pytest.mark.parametrize("raw", [b"", b" {}", b"[]", b"null", b'"x"', b"{}", b'{"__metadata__":null}', b"\xff\xfe{}"])
def test_what_is_no_object_is_refused(raw: bytes, tmp_path: Path) -> None:
    assert bool(library(tmp_path / "x", raw, 8 + len(raw))) == bool(refusal(raw, 8 + len(raw)))
