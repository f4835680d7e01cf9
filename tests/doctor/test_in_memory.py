"""Adapters have the names that transformers gives layers in memory, their checkpoints those of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel

from harness.doctor import inspect_file
from harness.doctor.in_memory import in_file
from harness.doctor.verify.verify import verify_merge
from tests.doctor.peft_merges import lora, lost, write

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
PICTURE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}


def vit() -> PreTrainedModel:
    torch.manual_seed(1)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURE, num_labels=3))


def dinov2() -> PreTrainedModel:
    torch.manual_seed(1)
    return transformers.Dinov2Model(transformers.Dinov2Config(**PICTURE))


def qwen3_next() -> PreTrainedModel:
    torch.manual_seed(1)
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    config = transformers.Qwen3NextConfig(
        **SIZES, **experts, **linear, linear_value_head_dim=8, num_key_value_heads=2, head_dim=8, vocab_size=100,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"vit": vit, "dinov2": dinov2, "qwen3 next": qwen3_next}


@pytest.mark.parametrize("name", MODELS)
def test_every_module_finds_its_layer_and_a_right_merge_is_right(name: str, tmp_path: Path) -> None:
    base, merged, adapter = write(tmp_path, MODELS[name](), lora(target_modules="all-linear"))
    report = verify_merge(base, merged, adapter)
    assert report.exit_code == 0, report.overall.text()
    record = inspect_file(adapter, base=base)
    assert set(record.codes) <= {"LH703"}, record.hazards
    assert record.fit is not None
    assert record.fit.applied == record.fit.modules == len(report.modules)


def test_a_layer_that_was_not_merged_is_named_as_the_adapter_names_it(tmp_path: Path) -> None:
    change = lost("vit.layers.1.attention.k_proj.weight")
    report = verify_merge(*write(tmp_path, vit(), lora(target_modules="all-linear"), change=change))
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()
    assert [v.worst_module for v in report.modules if not v.ok] == ["vit.layers.1.attention.k_proj"]


def test_the_names_are_those_of_transformers_own_conversions(tmp_path: Path) -> None:
    base, _, _ = write(tmp_path, vit(), lora(target_modules="all-linear"))
    names = in_file(transformers.AutoConfig.from_pretrained(base).to_dict(), 20)
    assert names["vit.layers.0.attention.q_proj"] == "vit.encoder.layer.0.attention.attention.query"


HOSTILE: dict[str, dict[str, Any]] = {
    "endless": {"architectures": ["ViTModel"], "model_type": "vit", "num_hidden_layers": 10**9},
    "endless stages": {"architectures": ["SwinModel"], "model_type": "swin", "depths": [2, 10**9]},
    "no model": {"architectures": ["os"], "model_type": "vit"},
    "no list": {"architectures": "ViTModel"},
    "loads another": {"architectures": ["DetrModel"], "model_type": "detr", "backbone": "resnet50"},
    "unknown": {"architectures": ["NobodyModel"], "model_type": "nobody"},
    "a string for a size": {"architectures": ["ViTModel"], "model_type": "vit", "hidden_size": "many"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_that_tells_nothing_is_left_alone(name: str) -> None:
    assert in_file(HOSTILE[name], 12) == {}


def test_a_callers_own_access_to_a_hub_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    seen: list[bool] = []
    post_init = PreTrainedModel.post_init
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        PreTrainedModel, "post_init", lambda model: (seen.append(constants.is_offline_mode()), post_init(model))
    )
    config = transformers.ViTConfig(**PICTURE, num_labels=5)
    assert in_file({**config.to_dict(), "architectures": ["ViTForImageClassification"]}, 2)
    assert seen
    assert all(seen)
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not constants.is_offline_mode()


def segformer() -> PreTrainedModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2}
    sizes |= {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2]}
    config = transformers.SegformerConfig(**sizes, mlp_ratios=[2, 2], decoder_hidden_size=16)
    return transformers.SegformerForSemanticSegmentation(config)


def test_a_target_that_the_model_has_in_its_file_alone_is_not_missed(tmp_path: Path) -> None:
    base, _, folder = write(tmp_path, segformer(), lora(target_modules=["query", "proj"]))
    with safe_open(base / "model.safetensors", "pt") as file:
        assert "segformer.encoder.block.0.0.attention.self.query.weight" in set(file.keys())
    assert inspect_file(folder, base=base).codes == ()
