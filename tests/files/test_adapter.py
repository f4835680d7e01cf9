"""What an adapter does after it was read."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from fixtures.build_malformed import floats, tensors_file
from harness.errors import LoraFileError
from harness.files import LoraWeights, read_lora, write_lora


def module(value: float = 1.0) -> LoraWeights:
    return LoraWeights(torch.full((2, 3), value), torch.full((4, 2), value), 1.0)


def test_an_adapter_travels_to_another_process_with_its_tensors(tmp_path: Path) -> None:
    adapter = read_lora(write_lora(tmp_path / "x", "peft", {"x": module(3.0)}))
    assert float(adapter.tensors("x")[0].sum()) == 18.0
    again = pickle.loads(pickle.dumps(adapter))
    assert again.modules == adapter.modules
    assert torch.equal(again.tensors("x")[0], adapter.tensors("x")[0])


def test_an_adapter_keeps_its_tensors_when_a_new_file_takes_the_place_of_the_old(tmp_path: Path) -> None:
    adapter = read_lora(write_lora(tmp_path / "x", "kohya", {"x": module(3.0)}))
    before = adapter.tensors("x")[0]
    write_lora(tmp_path / "x", "kohya", {"x": module(5.0)})
    assert torch.equal(adapter.tensors("x")[0], before)
    assert float(read_lora(adapter.path).tensors("x")[0][0, 0]) == 5.0


def test_an_unknown_module_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        read_lora(write_lora(tmp_path / "x", "kohya", {"x": module()})).tensors("y")


def test_a_module_without_a_and_b_says_so(tmp_path: Path) -> None:
    entries = {
        f"lora_unet_x.hada_w{i}_{half}": floats(*shape) for i in "12" for half, shape in (("a", (4, 2)), ("b", (2, 3)))
    }
    (tmp_path / "x.safetensors").write_bytes(tensors_file(entries))
    adapter = read_lora(tmp_path / "x.safetensors")
    assert (adapter.modules["x"].variant, adapter.modules["x"].rank) == ("loha", 2)
    with pytest.raises(LoraFileError, match="a loha module has no A and B"):
        adapter.tensors("x")


@pytest.mark.parametrize(
    ("entries", "rank", "sizes"),
    [
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5)}, 0, (15, 8)),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 7), "lokr_w2_b": (7, 5)}, 7, (15, 8)),
        ({"lokr_w1_a": (2, 6), "lokr_w1_b": (6, 3), "lokr_w2": (4, 5)}, 6, (15, 8)),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (7, 4), "lokr_w2_b": (7, 5), "lokr_t2": (7, 7, 3, 3)}, 7, (15, 8)),
        (
            {"lora_mid.weight": (2, 2, 3, 3), "lora_down.weight": (2, 3, 1, 1), "lora_up.weight": (4, 2, 1, 1)},
            2,
            (3, 4),
        ),
    ],
)
def test_the_sizes_of_lycoris_variants(
    tmp_path: Path, entries: dict[str, tuple[int, ...]], rank: int, sizes: tuple[int, int]
) -> None:
    tensors = {f"lora_unet_x.{tail}": floats(*shape) for tail, shape in entries.items()}
    (tmp_path / "x.safetensors").write_bytes(tensors_file({**tensors, "lora_unet_x.alpha": floats(value=3.5)}))
    found = read_lora(tmp_path / "x.safetensors").modules["x"]
    assert (found.rank, (found.in_features, found.out_features)) == (rank, sizes)
    assert found.trained_scale == (3.5 / rank if rank else 1.0)


@pytest.mark.parametrize(
    ("dtype", "raw", "value"),
    [
        ("F64", b"\0\0\0\0\0\0\xf8\x3f", 1.5), ("F32", b"\0\0\xc0\x3f", 1.5), ("F16", b"\0\x3e", 1.5),
        ("BF16", b"\xc0\x3f", 1.5), ("F8_E4M3", b"\x3c", 1.5), ("F8_E5M2", b"\x3e", 1.5),
        ("I64", b"\3" + bytes(7), 3.0), ("U8", b"\7", 7.0), ("F8_E4M3", b"\x7e", 448.0), ("F8_E5M2", b"\x01", 2.0**-16),
    ],
)  # fmt: skip
def test_alpha_is_read_in_every_dtype_and_shape_of_one_element(
    tmp_path: Path, dtype: str, raw: bytes, value: float
) -> None:
    pair = {"lora_unet_x.lora_down.weight": floats(2, 4), "lora_unet_x.lora_up.weight": floats(3, 2)}
    for shape in ([], [1], [1, 1]):
        (tmp_path / "x.safetensors").write_bytes(tensors_file({**pair, "lora_unet_x.alpha": (dtype, shape, raw)}))
        assert read_lora(tmp_path / "x.safetensors").modules["x"].alpha == value
