"""The header as safetensors tells it is the header as JSON says it, and single numbers are read wherever they lie."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from harness.errors import LoraFileError, NoLoraError
from harness.files import read_header
from harness.files import safetensors_file as module

F32 = struct.Struct("<f")


def write(
    path: Path, tensors: dict[str, tuple[str, list[int], int]], metadata: object = None, blanks: bool = False
) -> Path:
    """Write zeros: name -> dtype, shape, bytes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=None if blanks else (",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return path


PLAIN = {"b": ("F32", [2, 3], 24), "a: {1}": ("BF16", [4], 8), "é": ("F32", [], 4), "c": ("BOOL", [3], 3)}


@pytest.mark.parametrize("blanks", [False, True])
@pytest.mark.parametrize("metadata", [None, {"x": "1"}, {"z": "a:b", "a": '{"k": 1}', "m": "\u202e"}])
def test_the_quick_way_says_what_the_header_says(tmp_path: Path, metadata: object, blanks: bool) -> None:
    path = write(tmp_path / "x.safetensors", PLAIN, metadata, blanks)
    raw, size = path.read_bytes(), path.stat().st_size
    text = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]
    quick = module._listed(path, text, size, module._validated(path, text, size))
    slow = module._parsed(path, text, size)
    assert quick == slow == read_header(path)
    assert quick is not None
    assert list(quick.tensors.items()) == list(slow.tensors.items())
    assert list(quick.metadata.items()) == list(slow.metadata.items())


@pytest.mark.parametrize("odd", [("F32", [0, 4], 0), ("F8_E8M0", [4], 4)])
def test_what_the_quick_way_cannot_tell_is_read_from_the_header(
    tmp_path: Path, odd: tuple[str, list[int], int]
) -> None:
    path = write(tmp_path / "x.safetensors", {**PLAIN, "odd": odd})
    raw = path.read_bytes()
    text = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]
    assert module._listed(path, text, len(raw), module._validated(path, text, len(raw))) is None
    assert read_header(path).tensors["odd"][:2] == (odd[0], tuple(odd[1]))


@pytest.mark.parametrize("gap", [0, 100, 5000])
def test_numbers_are_read_from_anywhere_in_any_order(tmp_path: Path, gap: int) -> None:
    tensors = {}
    for number in range(40):
        tensors[f"{number}"] = ("F32", [], 4)
        if gap:
            tensors[f"gap {number}"] = ("U8", [gap], gap)
    path = write(tmp_path / "x.safetensors", tensors)
    file = read_header(path)
    with path.open("r+b") as stream:
        for number in range(40):
            stream.seek(file.tensors[f"{number}"].start)
            stream.write(F32.pack(number + 0.5))
    keys = [f"{number}" for number in reversed(range(40))]
    assert file.numbers(keys) == {key: int(key) + 0.5 for key in keys}
    assert file.numbers([]) == {}


@pytest.mark.parametrize("text", ['{"error": "log in"}', "\ufeffAccess denied\n", "Not Found", "é" * 400])
def test_a_text_in_the_place_of_a_file_is_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(NoLoraError, match="is text, not the weights: " + re.escape(text.strip("\ufeff\n")[:50])):
        read_header(path)


def test_an_archive_is_no_pickle_and_what_torch_saves_is(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(LoraFileError, match="is a PyTorch pickle") as pickled:
        read_header(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lora.safetensors", b"\0" * 200)
    with pytest.raises(NoLoraError, match="is a zip archive: unpack it first"):
        read_header(path)
    assert not isinstance(pickled.value, NoLoraError)
