"""Which tool takes which names: a repair says when none does, transformers and prefixes have rules of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor.answer import Question
from harness.doctor.diagnose import diagnose
from harness.doctor.repair.repair import repair_file
from harness.doctor.told import lines
from harness.errors import UserError

FLUX = [f"transformer_blocks.{block}.attn.to_{part}" for block in range(2) for part in "qkv"]
FLUX += [f"single_transformer_blocks.{block}.attn.to_{part}" for block in range(2) for part in "qkv"]
SHARED = [
    f"transformer_blocks.{block}.attn.{part}" for block in range(5) for part in ("to_q", "to_k", "to_v", "to_out.0")
]
LLAMA = [f"model.layers.0.self_attn.{part}_proj" for part in "qk"]


def pairs(
    path: Path, names: list[str], prefix: str, *, side: int = 3072, tails: tuple[str, str] = ("lora_A", "lora_B")
) -> Path:
    tensors = {f"{prefix}{name}.{tails[0]}.weight": torch.ones(2, side) for name in names}
    save_file(tensors | {f"{prefix}{name}.{tails[1]}.weight": torch.ones(side, 2) for name in names}, path)
    return path


def peft(folder: Path, prefix: str = "base_model.model.", adapter: str = "") -> Path:
    folder.mkdir()
    pairs(folder / "adapter_model.safetensors", LLAMA, prefix, side=8, tails=(f"lora_A{adapter}", f"lora_B{adapter}"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_a_repair_says_that_its_tool_does_not_find_the_layers(tmp_path: Path, to: str) -> None:
    report = repair_file(pairs(tmp_path / "lora.safetensors", FLUX, "transformer."), to, tmp_path / "new", scale=1.0)
    (note,) = report.notes
    assert note.startswith("ComfyUI loads none of its modules")
    assert "--base MODEL" in note


def test_a_repair_that_is_read_says_nothing(tmp_path: Path) -> None:
    report = repair_file(
        pairs(tmp_path / "lora.safetensors", FLUX, "transformer."), "diffusers", tmp_path / "new", scale=1
    )
    assert report.notes == ()


def test_llama_cpp_has_names_of_its_own(tmp_path: Path) -> None:
    report = repair_file(peft(tmp_path / "lora"), "gguf", tmp_path / "new")
    assert any("they are called as blk_#_*: convert the PEFT folder" in note for note in report.notes)


def test_a_scale_beside_alpha_is_not_repaired(tmp_path: Path) -> None:
    path, stem = tmp_path / "lora.safetensors", "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(2.0), f"{stem}.scale": torch.tensor(0.5)}, path)
    with pytest.raises(UserError, match=r"proj_in\.scale stands in place of alpha / rank"):
        repair_file(path, "kohya", tmp_path / "new")


@pytest.mark.parametrize(
    ("prefix", "adapter", "in_peft", "in_transformers"),
    [
        ("base_model.model.", "", "law", "law"),
        ("base_model.model.", ".default", "law", "nothing"),
        ("", "", "nothing", "law"),
        ("base_model.model.base_model.model.", "", "nothing", "law"),
    ],
)
def test_transformers_has_rules_of_its_own(
    tmp_path: Path, prefix: str, adapter: str, in_peft: str, in_transformers: str
) -> None:
    folder = peft(tmp_path / "lora", prefix, adapter)
    found = {tool: diagnose(folder, tool=tool).answers[tool].effect for tool in ("peft", "transformers")}
    assert found == {"peft": in_peft, "transformers": in_transformers}


@pytest.mark.parametrize(
    ("prefix", "effect"), [("transformer.", "law"), ("unet.", "unknown"), ("transformer_2.", "unknown")]
)
def test_a_prefix_of_another_part_is_not_the_denoiser_s(tmp_path: Path, prefix: str, effect: str) -> None:
    given = diagnose(pairs(tmp_path / "lora.safetensors", FLUX, prefix), tool="diffusers").answers["diffusers"]
    assert given.effect == effect


def test_an_answer_that_hangs_on_the_model_says_which(tmp_path: Path) -> None:
    path = pairs(tmp_path / "lora.safetensors", SHARED, "", tails=("lora_A.default", "lora_B.default"))
    found = dict(lines(diagnose(path, tool="diffusers", asked=Question(lora_alpha=2.0))))
    assert "if the model is Qwen-Image" in found["tool"]
    assert found["do"] == "ask again with --base MODEL if the model is not Qwen-Image"


def test_broken_weights_have_no_number(tmp_path: Path) -> None:
    path, name = tmp_path / "lora.safetensors", f"transformer.{FLUX[0]}"
    save_file({f"{name}.lora_A.weight": torch.full((2, 8), torch.nan), f"{name}.lora_B.weight": torch.ones(8, 2)}, path)
    found = dict(lines(diagnose(path)))
    assert found["pass"] == "no number makes it right"
    assert "take an earlier step" in found["do"]
