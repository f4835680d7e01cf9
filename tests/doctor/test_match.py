"""`inspect`, `verify` and `repair` find the same layers, whatever prefix either side has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor import inspect_file, repair_file, verify_merge
from harness.doctor.match import layers_by_spelling, match_layers
from harness.doctor.repair.naming import layers_from
from harness.files import LoraWeights, read_lora, write_lora

QWEN = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
DIFFUSERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0")
# names, prefix in the checkpoint, prefix in the LoRA, format of the LoRA
CASES = [
    *((QWEN, base, lora, "peft") for base in ("model.", "") for lora in ("model.", "")),
    *((QWEN, base, lora, "kohya") for base in ("model.", "") for lora in ("model.", "")),
    *((DIFFUSERS, base, "", format) for base in ("", "transformer.", "model.diffusion_model.")
      for format in ("peft", "diffusers", "comfyui", "kohya")),
]  # fmt: skip
Files = tuple[Path, Path, Path, list[str]]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1]}{case[0][0]}-{case[2]}{case[3]}")
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """A base, its right merge, the LoRA, and the names that the LoRA's modules have with dots."""
    names, base_prefix, lora_prefix, format = request.param
    torch.manual_seed(0)
    pairs = {name: LoraWeights(torch.randn(4, 48), 0.1 * torch.randn(48, 4), 8.0) for name in names}
    base = {f"{base_prefix}{name}.weight": torch.randn(48, 48) for name in names}
    merged = {f"{base_prefix}{name}.weight": 2 * pair.b @ pair.a for name, pair in pairs.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file({key: value + base[key] for key, value in merged.items()}, tmp_path / "merged.safetensors")
    lora = write_lora(tmp_path / "lora", format, {lora_prefix + name: pair for name, pair in pairs.items()})
    return tmp_path / "base.safetensors", tmp_path / "merged.safetensors", lora, [lora_prefix + name for name in names]


def test_inspect_measures_every_module_against_its_layer(files: Files) -> None:
    base, _, lora, names = files
    record = inspect_file(lora, base=base)
    assert not [note for note in record.notes if "no module" in note]
    assert [energy.relative is not None for energy in (record.energies or {}).values()] == [True] * len(names)


def test_verify_measures_every_module(files: Files) -> None:
    base, merged, lora, names = files
    report = verify_merge(base, merged, lora)
    assert report.ok, report.overall.text()
    assert len(report.modules) == len(names)


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_repair_writes_the_names_of_the_lora_with_dots(files: Files, tmp_path: Path, to: str) -> None:
    base, merged, lora, names = files
    repaired = read_lora(repair_file(lora, to, tmp_path / "new", model_names=layers_from(base)).path)
    wanted = [name.replace(".", "_") for name in names] if to == "kohya" else names
    assert sorted(module.name for module in repaired.modules.values()) == sorted(wanted)
    assert verify_merge(base, merged, repaired.path).ok


def lora_with(folder: Path, format: str, *names: str) -> Path:
    return write_lora(
        folder / "lora", format, {name: LoraWeights(torch.ones(2, 4), torch.ones(4, 2), 2.0) for name in names}
    )


def test_a_layers_own_name_comes_before_a_prefix_left_out(tmp_path: Path) -> None:
    adapter = read_lora(lora_with(tmp_path, "peft", "x.q"))
    assert match_layers(adapter, ["model.x.q", "x.q"])["x.q"].layer == "x.q"


def test_a_name_that_fits_two_layers_fits_none(tmp_path: Path) -> None:
    adapter = read_lora(lora_with(tmp_path, "peft", "x.q"))
    assert match_layers(adapter, ["model.x.q", "unet.x.q"]) == {}


def test_a_layer_that_two_modules_claim_is_left_out(tmp_path: Path) -> None:
    adapter = read_lora(lora_with(tmp_path, "peft", "model.x.q", "x.q"))
    assert match_layers(adapter, ["x.q", "y"]) == {}


def test_a_flattened_name_is_not_taken_for_a_prefix_and_another_model() -> None:
    assert "transformer.blocks.0.q" not in layers_by_spelling(["blocks.0.q"], flattened=True)
    assert "transformer.blocks.0.q" in layers_by_spelling(["blocks.0.q"], flattened=False)
