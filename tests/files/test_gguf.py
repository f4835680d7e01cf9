"""GGUF adapters: the package's own reader and writer agree with ours, and malformed files are one sentence."""

from __future__ import annotations

import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.build_formats import SAMPLES, build
from harness.errors import LoraFileError
from harness.files import LoraWeights, read_lora, write_lora

gguf = pytest.importorskip("gguf")
SAMPLE = next(sample for sample in SAMPLES if sample.format == "gguf")


def weights(rank: int = 4) -> LoraWeights:
    return LoraWeights(torch.randn(rank, 32), torch.randn(3, rank), 6.0)


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    made = {"blk.0.attn_q": weights(), "token_embd": weights()}
    reader = gguf.GGUFReader(write_lora(tmp_path / "x", "gguf", made))
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    assert reader.get_field("adapter.lora.alpha").contents() == 6.0
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert torch.equal(found["blk.0.attn_q.weight.lora_a"], made["blk.0.attn_q"].a)
    assert torch.equal(found["blk.0.attn_q.weight.lora_b"], made["blk.0.attn_q"].b)
    assert torch.equal(found["token_embd.weight.lora_a"], made["token_embd"].a.t())
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.0.attn_q.weight.lora_a"] == [32, 4]  # ggml counts the other way round


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_the_package_writes_is_read(tmp_path: Path, kind: str) -> None:
    made = weights()
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_float32("adapter.lora.alpha", 8.0)
    quantised = gguf.GGMLQuantizationType[kind]
    a = gguf.quants.quantize(made.a.numpy(), quantised)
    writer.add_tensor("blk.1.ffn_up.weight.lora_a", a, raw_dtype=quantised)
    writer.add_tensor("blk.1.ffn_up.weight.lora_b", made.b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = read_lora(tmp_path / "x.gguf")
    module = adapter.modules["blk.1.ffn_up"]
    assert (module.dtype, module.rank, module.in_features, module.trained_scale) == (kind, 4, 32, 2.0)
    read_a, read_b = adapter.tensors("blk.1.ffn_up")
    assert torch.equal(read_a.float(), torch.from_numpy(gguf.quants.dequantize(a, quantised)))
    assert torch.equal(read_b, made.b)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (2.0, 0.5)])
def test_alpha_zero_means_scale_one_as_in_llama_cpp(tmp_path: Path, alpha: float | None, scale: float) -> None:
    made = LoraWeights(torch.ones(4, 3), torch.ones(3, 4), alpha)
    adapter = read_lora(write_lora(tmp_path / "x", "gguf", {"blk.0.attn_q": made}))
    assert adapter.modules["blk.0.attn_q"].trained_scale == scale
    assert adapter.alpha_source == ("header" if alpha else "none")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(SAMPLE, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoraFileError, match=r"install `gguf` to have it read \(lora-harness\[gguf\]\)"):
        read_lora(path)


def head(version: int = 3, tensors: int = 0, values: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, values)


def key(text: str, kind: int) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + struct.pack("<I", kind)


def info(dims: list[int], offset: int = 0) -> bytes:
    name = b"blk.0.a.weight.lora_a"
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        head(version=99),
        head(values=1 << 60),
        head(tensors=1 << 60) + bytes(1000),
        head(tensors=100_001) + bytes(100),
        head(values=1) + struct.pack("<Q", 1 << 62),
        head(values=1) + key("a", 77) + bytes(64),
        head(values=1) + key("a", 9) + struct.pack("<IQ", 0, 1 << 40) + bytes(64),
        head(values=1) + key("a", 9) + struct.pack("<IQ", 9, 1) * 3000,
        head(values=1) + key("\0", 8) + struct.pack("<Q", 2) + b"\xff\xfe",
        head(tensors=1) + info([1 << 62, 1 << 62]) + bytes(64),
        head(tensors=1) + info([1 << 32, 1 << 32]) + bytes(64),
        head(tensors=1) + info([4, 2], offset=(1 << 64) - 64) + bytes(128),
        head(tensors=1) + info([4, 2], offset=1 << 20) + bytes(64),
        head(tensors=1) + info([4, 2]),
        head(tensors=2) + info([4, 2]) * 2 + bytes(128),
        head(tensors=1) + struct.pack("<Q", 3) + b"\xff\xff\xff" + bytes(64),
    ],
    ids=range(17),
)
def test_a_malformed_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(LoraFileError) as raised:
        read_lora(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 400
    assert str(raised.value).isprintable()


def test_every_truncation_of_a_good_file_is_one_sentence(tmp_path: Path) -> None:
    whole = build(SAMPLE, tmp_path).read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(4, len(whole) - 32, 7):
        path.write_bytes(whole[:end])
        with pytest.raises(LoraFileError):
            read_lora(path)


WHOLE = st.integers(4, 500), st.integers(0, 255)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(*WHOLE), min_size=1, max_size=3))
def test_flipped_bytes_are_read_or_refused(flips: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = build(SAMPLE, Path(folder))
        raw = bytearray(path.read_bytes())
        for place, value in flips:
            raw[place % len(raw)] = value
        path.write_bytes(raw)
        with suppress(LoraFileError):
            adapter = read_lora(path, strict=False)
            parts = [(module, adapter.part(n, role)) for n, module in adapter.modules.items() for role in module.keys]
            assert all(module.rank in tensor.shape for module, tensor in parts)


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head(tensors=1) + info([4, 2]).replace(b".lora_a", b".weight") + bytes(64))
    with pytest.raises(LoraFileError, match="no LoRA format fits"):
        read_lora(path)
