"""`diagnose --base`: no number for a model that the file is not for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from harness.cli import main
from harness.files import LoraWeights, write_lora

LAYERS = [f"transformer_blocks.{i}.attn.{part}" for i in range(3) for part in ("to_q", "to_k", "to_v")]


def lora(folder: Path, width: int = 3072) -> Path:
    modules = {name: LoraWeights(torch.randn(4, width), torch.randn(width, 4), 2.0) for name in LAYERS}
    return write_lora(folder / "lora.safetensors", "diffsynth", modules)


def model(folder: Path, names: list[str], width: int = 3072) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({f"{name}.weight": torch.zeros(width, width) for name in names}, folder / "model.safetensors")
    return folder


def said(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(main, ["diagnose", *map(str, words)])
    return found.exit_code, found.output


BASES = {
    "other names": (["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"], 3072),
    "other shapes": (LAYERS, 64),
}


@pytest.mark.parametrize("tool", [(), ("--tool", "comfyui"), ("--tool", "diffsynth", "--tool-version", "2.0.4")])
@pytest.mark.parametrize("which", BASES)
def test_a_base_that_nothing_applies_to_gets_no_number(tmp_path: Path, which: str, tool: tuple[str, ...]) -> None:
    code, out = said(lora(tmp_path), "--base", model(tmp_path / "base", *BASES[which]), *tool)
    assert code == 1
    assert "applies to 0 of 9 modules" in out
    assert "LH719" in out
    assert "pass  no number" in out
    assert "nothing else" not in out
    assert "strength_model" not in out


def test_a_base_that_all_of_it_applies_to_changes_nothing(tmp_path: Path) -> None:
    path, base = lora(tmp_path), model(tmp_path / "base", LAYERS)
    plain, with_base = said(path, "--tool", "comfyui"), said(path, "--tool", "comfyui", "--base", base)
    assert plain[0] == with_base[0] == 0
    assert "strength_model = 1" in with_base[1]
    assert "applies to 9 of 9 modules" in with_base[1]


def test_a_base_without_some_of_the_layers_is_asked_about(tmp_path: Path) -> None:
    code, out = said(lora(tmp_path), "--tool", "comfyui", "--base", model(tmp_path / "base", LAYERS[:6]))
    assert (code, "strength_model = 1" in out) == (0, True)
    assert "LH718 3 of 9 modules have no layer in the base" in " ".join(out.split())
    assert "check that this is the base" in out


def test_a_picture_of_noise_is_traced_to_the_other_model_first(tmp_path: Path) -> None:
    base = model(tmp_path / "base", *BASES["other names"])
    code, out = said(lora(tmp_path), "--base", base, "--saw", "noise", "--json")
    data = json.loads(out)
    assert code == 1
    assert data["causes"][0]["what"].startswith("another model than")
    assert any("LH719" in each for each in data["base_hazards"])


def test_a_pipeline_is_its_denoiser_whatever_lies_beside_it(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    model(tmp_path / "pipeline", [])
    save_file({"prompts": torch.zeros(3)}, pipeline / "prompts.safetensors")
    (pipeline / "model_index.json").write_text("{}")
    model(pipeline / "transformer", LAYERS)
    code, out = said(lora(tmp_path), "--tool", "comfyui", "--base", pipeline)
    assert code == 0
    assert "applies to 9 of 9 modules" in out
