"""Once the model is given, an answer holds for the modules that it has, under names that the tool is known to find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor.answer import Answer, Question
from harness.doctor.causes import Saw
from harness.doctor.diagnose import FileDiagnosis, diagnose
from harness.doctor.inspect.describe import inspect_file
from harness.doctor.told import lines

HUNYUAN = [f"double_blocks.{block}.img_mlp" for block in range(2)]
FLUX = [f"double_blocks.{block}.{part}" for block in range(8) for part in ("img_attn.qkv", "img_mod.lin")]
LLAMA = [f"model.layers.{block}.self_attn.{part}_proj" for block in range(3) for part in "qkvo"]
UNKNOWN = [f"stages.{block}.mixer.inner" for block in range(4)]


def kohya(path: Path, names: Sequence[str], side: int = 16) -> Path:
    tensors = {}
    for name in names:
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, side), f"{stem}.lora_up.weight": torch.ones(side, 2)}
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def plain(path: Path, names: Sequence[str], prefix: str, inputs: int = 16) -> Path:
    tensors = {f"{prefix}{name}.lora_A.weight": torch.ones(2, inputs) for name in names}
    save_file(tensors | {f"{prefix}{name}.lora_B.weight": torch.ones(16, 2) for name in names}, path)
    return path


def peft(path: Path) -> Path:
    folder = path / "lora"
    folder.mkdir()
    plain(folder / "adapter_model.safetensors", LLAMA, "base_model.model.")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def model(path: Path, names: Sequence[str], side: int = 16) -> Path:
    save_file({f"{name}.weight": torch.ones(side, side) for name in names}, path)
    return path


def asked(path: Path, tool: str, base: Path | None = None, saw: Saw | None = None) -> tuple[Answer, FileDiagnosis]:
    found = diagnose(path, tool=tool, asked=Question(lora_alpha=2.0), base=base, saw=saw)
    return found.answers[tool], found


def test_a_model_that_nobody_knows_is_answered_for_the_names_that_it_may_have(tmp_path: Path) -> None:
    given, found = asked(kohya(tmp_path / "lora.safetensors", UNKNOWN), "comfyui")
    assert given.strength == 1
    assert given.says == "applies every module that its model has under this name as trained"
    assert "there is no `lora key not loaded` in its console" in dict(lines(found))["do"]


def test_layers_that_a_tool_calls_by_names_of_its_own_are_unknown_to_it(tmp_path: Path) -> None:
    names = [f"{name}.{half}" for name in HUNYUAN for half in ("fc1", "fc2")]
    assert asked(kohya(tmp_path / "lora.safetensors", names), "comfyui")[0].effect == "unknown"


def test_names_that_only_the_harness_brings_together_are_no_promise_of_a_tool(tmp_path: Path) -> None:
    lora = peft(tmp_path)
    inner = [name.replace("model.", "model.language_model.", 1) for name in LLAMA]
    same, other = model(tmp_path / "same.safetensors", LLAMA), model(tmp_path / "other.safetensors", inner)
    assert asked(lora, "peft", same)[0].effect == "law"
    given, _ = asked(lora, "vllm", other)
    assert (given.effect, given.strength) == ("unknown", None)
    assert "this base calls otherwise" in given.says


def test_inspect_says_the_same_of_a_base(tmp_path: Path) -> None:
    lora = kohya(tmp_path / "lora.safetensors", FLUX)
    record = inspect_file(lora, base=model(tmp_path / "base.safetensors", FLUX[5:]))
    assert record.prescription["forge"] is None
    assert "15 of its keys have no layer in this base" in record.unprescribed["forge"]
    assert inspect_file(lora).prescription["forge"] == 1


@pytest.mark.parametrize(("left", "effect"), [(4, "law"), (5, "nothing")])
def test_forge_leaves_a_whole_file_out_for_more_than_twelve_keys(left: int, effect: str, tmp_path: Path) -> None:
    lora = kohya(tmp_path / "lora.safetensors", FLUX)
    given, found = asked(lora, "forge", model(tmp_path / "base.safetensors", FLUX[left:]), "nothing")
    assert given.effect == effect
    said = dict(lines(found))
    assert ("11 of 16" if left == 5 else "12 of 16 modules that this base has") in " ".join(said.values())
    assert "no layer in the base" in said["cause 1"]


def test_a_layer_with_more_inputs_is_widened_by_diffusers_alone(tmp_path: Path) -> None:
    names = ["x_embedder", *(f"transformer_blocks.{block}.attn.to_q" for block in range(2))]
    lora, base = tmp_path / "lora.safetensors", model(tmp_path / "base.safetensors", names)
    wide = {"transformer.x_embedder.lora_A.weight": torch.ones(2, 96)}
    tensors = {
        f"transformer.{n}.lora_{half}.weight": torch.ones(*shape)
        for n in names
        for half, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    save_file(tensors | wide, lora)
    for tool, who in (("diffusers", "it widens that"), ("comfyui", "only diffusers is known to widen that")):
        assert asked(lora, tool, base)[0].says.endswith(
            f"more inputs than its layer here, as control and Fill LoRAs have: {who}"
        )


def test_a_format_is_refused_for_the_release_that_was_read_alone(tmp_path: Path) -> None:
    folder = peft(tmp_path)
    effects = {
        version: diagnose(folder, tool="lycoris", asked=Question(version)).answers["lycoris"].effect
        for version in (None, "4.1.3", "v4.1.3", "3.0.0")
    }
    assert effects == {None: "cannot", "4.1.3": "cannot", "v4.1.3": "cannot", "3.0.0": "unknown"}


def test_a_format_that_was_not_looked_up_is_not_refused(tmp_path: Path) -> None:
    found = diagnose(peft(tmp_path), tool="comfyui").answers["comfyui"]
    assert (found.effect, found.sure, found.strength) == ("unknown", "unknown", None)
    assert found.says.startswith("was not measured on peft files like this: it is known to read kohya, comfyui")


def test_a_weak_effect_may_be_dropped_modules_or_a_quantised_base(tmp_path: Path) -> None:
    _, found = asked(kohya(tmp_path / "lora.safetensors", UNKNOWN), "comfyui", saw="weak")
    said = [text for label, text in lines(found) if label.startswith("cause")]
    assert said[0] == "modules dropped or misplaced"
    assert said[1].startswith("a quantised base")
    assert "the scale is right" not in said[2]
