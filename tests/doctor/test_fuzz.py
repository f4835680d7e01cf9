"""Whatever stands in a file, the answer is a record or one sentence, never another exception."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.build_malformed import dotted, floats, framed, kohya, tensors_file
from harness.doctor import inspect_file
from harness.errors import LoraFileError
from harness.files import read_lora
from harness.files.keys import EVERY_TAIL

NUMBERS = (
    st.integers(-3, 20) | st.just(10**30) | st.floats(allow_nan=True) | st.booleans() | st.none() | st.text(max_size=3)
)
JSON = st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
STEMS = st.sampled_from(
    ["lora_unet_x", "transformer.x", "base_model.model.x", "x", "lora_te1_x", "diffusion_model.x", "", "."]
)
SHAPES = st.lists(st.integers(0, 4), max_size=5)


def judged(path: Path) -> None:
    """Read and inspect `path`; only LoraFileError may be raised, and the record must be JSON and printable."""
    for strict in (True, False):
        with contextlib.suppress(LoraFileError):
            read_lora(path, strict=strict)
    record = inspect_file(path, energy=True)
    assert all(hazard.what.isprintable() for hazard in record.hazards)
    json.loads(record.model_dump_json())
    assert record.readable or record.codes in (("LH797",), ("LH799",))


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 500) | st.none())
def test_a_flipped_byte_or_a_cut_anywhere(place: int, byte: int, cut: int | None) -> None:
    content = bytearray(tensors_file(kohya() | {"lora_unet_x.dora_scale": floats(1, 4)}, {"ss_network_alpha": "1"}))
    content[place % len(content)] = byte
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.safetensors").write_bytes(content[:cut])
        judged(Path(folder) / "x.safetensors")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.tuples(STEMS, st.sampled_from(sorted(EVERY_TAIL))), SHAPES, max_size=8))
def test_any_set_of_known_tails_with_any_shapes(tensors: dict[tuple[str, str], list[int]]) -> None:
    entries = {f"{stem}.{tail.replace('*', 'default')}": floats(*shape) for (stem, tail), shape in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.safetensors").write_bytes(tensors_file(entries))
        judged(Path(folder) / "x.safetensors")


FIELDS = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "target_modules")


@settings(max_examples=150, deadline=None)
@given(config=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8) | JSON, header=st.booleans())
def test_any_adapter_configuration(config: Any, header: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        if header:
            prefixed = {f"transformer.{k}": v for k, v in config.items()} if isinstance(config, dict) else config
            path.write_bytes(tensors_file(dotted("transformer.x"), {"lora_adapter_metadata": json.dumps(prefixed)}))
        else:
            path.write_bytes(tensors_file(dotted("base_model.model.x")))
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        judged(path)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), JSON, max_size=4))
def test_any_header(header: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(framed(json.dumps(header).encode(), bytes(8)))
        judged(path)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["ss_network_alpha", "ss_network_args", "alpha", "ss_tag"]) | st.text(), st.text())
)
def test_any_metadata(metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        try:
            path.write_bytes(tensors_file(kohya(), dict(metadata)))
        except UnicodeEncodeError:
            return
        judged(path)
