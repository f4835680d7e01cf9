"""`inspect --base`: what applies, what does not, the wrong model, and models whose names differ in memory and file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.doctor import inspect_file
from harness.files import LoraWeights, write_lora

Shapes = dict[str, tuple[int, int]]
SDXL = {f"down_blocks.1.attentions.0.transformer_blocks.{i}.attn2.to_k": (64, 2048) for i in range(2)}
SD1 = {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (64, 768)}
FLUX = {"double_blocks.0.img_attn.qkv": (48, 16), "single_blocks.0.linear1": (112, 16)}
CHROMA = {
    "single_transformer_blocks.0.attn.to_q": (16, 16), "single_transformer_blocks.0.attn.to_k": (16, 16),
    "single_transformer_blocks.0.attn.to_v": (16, 16), "single_transformer_blocks.0.proj_mlp": (64, 16),
    "distilled_guidance_layer.layers.0.linear_1": (8, 8),
}  # fmt: skip
Z_IMAGE = {"layers.0.attention.qkv": (48, 16), "layers.0.attention.out": (16, 16)}
LLAMA = {f"model.layers.0.self_attn.{part}_proj": (16, 16) for part in "qkv"}


def lora(folder: Path, format: str, shapes: Shapes) -> Path:
    torch.manual_seed(0)
    pairs = {
        name: LoraWeights(torch.randn(4, inputs), torch.randn(outputs, 4), 4.0)
        for name, (outputs, inputs) in shapes.items()
    }
    return write_lora(folder / "lora", format, pairs)


def base(folder: Path, shapes: Shapes) -> Path:
    save_file({f"{name}.weight": torch.randn(*shape) for name, shape in shapes.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


def test_split_modules_on_a_fused_base_all_apply(tmp_path: Path) -> None:
    split = {f"layers.0.attention.to_{part}": (16, 16) for part in "qkv"} | {"layers.0.attention.to_out.0": (16, 16)}
    record = inspect_file(lora(tmp_path, "kohya", split), base=base(tmp_path, Z_IMAGE))
    assert record.fit is not None
    assert record.fit.applied == 4
    assert not record.hazards
    assert all(energy.relative for energy in (record.energies or {}).values())


@pytest.mark.parametrize(
    ("file", "other", "says"),
    [
        (SDXL, FLUX, ("a LoRA of SDXL", "looks like FLUX")),
        (SDXL, SD1, ("a LoRA of SDXL", "looks like Stable Diffusion 1")),
        (FLUX, LLAMA, ("a LoRA of FLUX", "a language model")),
        (Z_IMAGE, CHROMA, ("a LoRA of Z-Image", "looks like Chroma")),
        (LLAMA, SD1, ("a LoRA of a language model", "looks like Stable Diffusion 1")),
    ],
)
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_wrong_model_is_named(
    tmp_path: Path, format: str, file: Shapes, other: Shapes, says: tuple[str, ...]
) -> None:
    path = lora(tmp_path, format, file)
    done = CliRunner().invoke(main, ["inspect", str(path), "--base", str(base(tmp_path, other))])
    assert done.exit_code == 1
    text = " ".join(done.output.split())
    assert "LH719" in text
    assert all(word in text for word in says), text


def test_what_has_no_layer_comes_first(tmp_path: Path) -> None:
    more = {**LLAMA, "model.layers.9.self_attn.q_proj": (16, 16)}
    record = inspect_file(lora(tmp_path, "peft", more), base=base(tmp_path, LLAMA))
    assert record.fit is not None
    assert record.fit.said.startswith(
        "1 of 4 modules has no layer in the base, such as model.layers.9.self_attn.q_proj"
    )
    assert "applies to 3 of 4 modules; shapes fit" in record.fit.said
    assert "LH718" in record.codes


def test_hostile_names_are_shown_escaped(tmp_path: Path) -> None:
    record = inspect_file(lora(tmp_path, "diffusers", {"a\x1b[2J.0.q": (16, 16)}), base=base(tmp_path, LLAMA))
    assert record.fit is not None
    assert "\x1b" not in record.fit.said + "".join(hazard.what for hazard in record.hazards)


def trained(model: Any, folder: Path, **options: Any) -> tuple[Path, Path]:
    """Save a model and an adapter of it, as transformers and PEFT write them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(model, LoraConfig(r=4, **options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter)
        adapted.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


def test_experts_in_one_parameter_apply(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model, adapter = trained(
        transformers.GptOssForCausalLM(config), tmp_path, target_modules=["q_proj"], target_parameters=experts
    )
    record = inspect_file(adapter, base=model)
    assert (record.fit and record.fit.applied, record.codes) == (6, ())


VISION = {
    "own": (lambda key: key, ()),
    "wrapped": (lambda key: key.replace("base_model.model.", "base_model.model.agent."), ("LH720",)),
}


@pytest.mark.parametrize("name", VISION)
def test_a_model_of_two_towers_is_judged_by_foreign_words_alone(tmp_path: Path, name: str) -> None:
    rename: Callable[[str], str]
    rename, codes = VISION[name]
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model, adapter = trained(
        transformers.Qwen2_5_VLForConditionalGeneration(config), tmp_path, target_modules=["q_proj", "v_proj", "qkv"]
    )
    file = adapter / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    record = inspect_file(adapter, base=model)
    assert (record.fit and record.fit.applied, record.codes) == (6, codes)
    assert any("several towers" in note for note in record.notes)


def test_a_text_encoder_beside_its_model_is_not_missing_from_it(tmp_path: Path) -> None:
    lora = {}
    for name in ("lora_transformer_blocks_0_attn_to_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        lora |= {f"{name}.lora_down.weight": torch.randn(4, 32), f"{name}.lora_up.weight": torch.randn(32, 4),
                 f"{name}.alpha": torch.tensor(4.0)}  # fmt: skip
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({"blocks.0.attn.to_q.weight": torch.randn(32, 32)}, tmp_path / "base.safetensors")
    record = inspect_file(tmp_path / "lora.safetensors", base=tmp_path / "base.safetensors")
    assert record.codes == ()
    assert record.fit is not None
    assert (record.fit.applied, record.fit.foreign_total) == (1, 1)
