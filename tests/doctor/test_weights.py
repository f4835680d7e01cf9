"""What `inspect` sees in the weights without being asked, and that alpha counts wherever it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from harness.cli import main
from harness.doctor import inspect_file
from harness.files import LoraWeights, read_lora, write_lora
from harness.files.safetensors_file import read_header
from tests.cases.layouts import BUILT

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
LAYOUTS = {layout.name: layout for layout in BUILT}


def pair(rank: int = 4, alpha: float | None = 4.0, *, b: float | None = None) -> LoraWeights:
    up = torch.randn(6, rank) if b is None else torch.full((6, rank), b)
    return LoraWeights(torch.randn(rank, 8), up, alpha)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_without_an_option(dtype: torch.dtype, odd: float, tmp_path: Path) -> None:
    if dtype == torch.float8_e4m3fn:  # which has no infinity
        odd = float("nan")
    weights = {
        f"lora_unet_x{i}.lora_{end}.weight": torch.ones(4, 4).to(dtype) for i in range(3) for end in ("down", "up")
    }
    weights["lora_unet_x1.lora_up.weight"] = torch.full((4, 4), odd).to(dtype)
    save_file(weights, tmp_path / "x.safetensors")
    record = inspect_file(tmp_path / "x.safetensors")
    assert "LH707" in record.codes
    assert "1 module (x1)" in next(hazard.what for hazard in record.hazards if hazard.code == "LH707")
    assert "LH707" not in inspect_file(tmp_path / "x.safetensors", headers_only=True).codes


def test_the_command_sees_nan_and_exits_with_1(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"a": pair(), "b": pair(b=float("nan"))})
    assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 1
    assert CliRunner().invoke(main, ["inspect", str(path), "--headers-only"]).exit_code == 0


@pytest.mark.parametrize(
    ("modules", "codes"),
    [
        ({"a": pair(b=0.0), "b": pair(b=0.0)}, ["LH713"]),
        ({"a": pair(b=-0.0)}, ["LH713"]),
        ({"a": pair(), "b": pair(), "c": pair(b=0.0)}, []),  # a note: training often reaches no weight of some layer
        ({"a": pair(), "b": pair(b=0.0), "c": pair(b=0.0)}, ["LH714"]),
        ({"a": pair(), "b": pair(), "c": LoraWeights(torch.zeros(4, 8), torch.randn(6, 4), 4.0)}, ["LH714"]),
    ],
)
def test_zero_factors_are_seen(modules: dict[str, LoraWeights], codes: list[str], tmp_path: Path) -> None:
    record = inspect_file(write_lora(tmp_path / "x", "kohya", modules))
    assert list(record.codes) == codes
    said = [*(hazard.what for hazard in record.hazards), *record.notes]
    assert [text for text in said if "all zero in" in text]


def test_extents_are_those_that_torch_finds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = (torch.randn(7, 5), -torch.rand(3), torch.zeros(4), torch.tensor([-0.0, 1e-4]))
    tensors = {f"{dtype}.{i}": value.to(dtype) for dtype in DTYPES for i, value in enumerate(values)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_header(tmp_path / "x.safetensors")
    found = file.extents(file.keys)
    assert {key: (extent.largest, extent.finite) for key, extent in found.items()} == {
        key: (float(tensor.double().abs().max()), True) for key, tensor in tensors.items()
    }


def test_weights_that_nobody_can_wait_for_are_not_read(tmp_path: Path) -> None:
    size = 1 << 40
    header = json.dumps({
        f"lora_unet_x.lora_{end}.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        for end, shape, offsets in (("down", [1, size], [0, 4 * size]), ("up", [1, 1], [4 * size, 4 * size + 4]))
    }).encode()  # fmt: skip
    with (tmp_path / "x.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 4 * size + 4)
    record = inspect_file(tmp_path / "x.safetensors")
    assert not record.weights_read
    assert any("not looked for" in note for note in record.notes)


def test_alpha_of_the_training_counts_in_every_line(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "diffusers", {"transformer_blocks.0.attn.to_q": pair(128, None)})
    record = inspect_file(path, lora_alpha=8.0, energy=True)
    plain = inspect_file(path, energy=True)
    assert (record.alphas, record.trained, record.alpha_source, record.codes) == (
        {"8": 1},
        (1 / 16, 1 / 16),
        "option",
        (),
    )
    assert (plain.alphas, plain.trained, plain.codes) == ({"none": 1}, None, ("LH701",))
    assert (record.prescription["diffusers"], plain.prescription["diffusers"]) == (1 / 16, None)
    assert "lora_alpha / 128" in plain.unprescribed["diffusers"]
    assert record.energy is not None
    assert plain.energy is not None
    assert record.energy["transformer_blocks.0.attn.to_q"] == pytest.approx(
        plain.energy["transformer_blocks.0.attn.to_q"] / 16
    )


def test_an_alpha_that_the_file_has_is_not_replaced(tmp_path: Path) -> None:
    record = inspect_file(write_lora(tmp_path / "x", "kohya", {"a": pair(4, 2.0)}), lora_alpha=64.0)
    assert (record.alphas, record.trained) == ({"2": 1}, (0.5, 0.5))
    assert any("--lora-alpha 64 is not used" in note for note in record.notes)


def test_an_alpha_of_0_is_a_scale_of_0_and_no_zero_product(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "peft", {"model.q": pair(4, 0.0)})
    record = inspect_file(path, energy=True)
    assert record.codes == ("LH705",)
    assert record.advice is not None
    assert record.advice.reason == "alpha is 0: the scale is 0, whatever B @ A is"
    assert record.prescription["peft"] is None
    assert "alpha 0" in record.unprescribed["peft"]
    given = inspect_file(path, energy=True, lora_alpha=8.0)
    assert (given.trained, given.codes) == ((2.0, 2.0), ())


def test_the_energy_of_experts_is_that_of_all_of_them(tmp_path: Path) -> None:
    path = LAYOUTS["automodel_experts"].write(tmp_path)
    adapter = read_lora(path)
    name = "model.layers.0.mlp.experts.down_projs"
    a, b = adapter.tensors(name)
    assert (a.shape, b.shape) == ((4, 8, 48), (4, 32, 8))
    energy = inspect_file(path, energy=True).energy
    assert energy is not None
    assert energy[name] == pytest.approx(float((0.5 * b @ a).norm()), rel=1e-4)


def test_a_lokr_of_two_full_factors_has_no_rank_and_no_traceback(tmp_path: Path) -> None:
    path = LAYOUTS["simpletuner_lycoris_lokr"].write(tmp_path)
    record = inspect_file(path)
    assert (record.ranks, record.alphas, record.codes) == ({"full": 1}, {}, ())
    done = CliRunner().invoke(main, ["inspect", str(path), "--loader", "lycoris"])
    assert (done.exit_code, done.exception) == (0, None)
    assert "no number" in done.output
