"""A configuration that declares what the file lacks, or keeps silent of what it has: PEFT itself is the judge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.doctor import inspect_file
from harness.doctor.diagnose import diagnose
from tests.doctor.peft_merges import drawn, llama, lora

pytestmark = pytest.mark.filterwarnings("ignore")
Tensors, Config = dict[str, Tensor], dict[str, Any]


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def same(tensors: Tensors) -> Tensors:
    return tensors


def lacking(key: str) -> Callable[[Config], Config]:
    return lambda config: {name: value for name, value in config.items() if name != key}


def saying(**fields: Any) -> Callable[[Config], Config]:
    return lambda config: {**config, **fields}


TOKENS = {"trainable_token_indices": {"embed_tokens": [1, 5]}}
REFUSED: dict[str, tuple[Config, Callable[[Tensors], Tensors], Callable[[Config], Config]]] = {
    "no type": ({}, same, lacking("peft_type")),
    "a type in small letters": ({}, same, saying(peft_type="lora")),
    "targets that are no expression": ({}, same, saying(target_modules=".*(q_proj")),
    "no targets": ({}, same, saying(target_modules=[])),
    "no ranks": ({}, same, saying(rank_pattern=None)),
    "a head that was lost": ({"modules_to_save": ["lm_head"]}, without("lm_head"), saying()),
    "one of two saved modules": ({"modules_to_save": ["lm_head", "norm"]}, without("lm_head"), saying()),
    "token rows that were lost": (TOKENS, without("embed_tokens"), saying()),
}
IN_PART: dict[str, tuple[Config, Callable[[Tensors], Tensors], Callable[[Config], Config]]] = {
    "magnitudes that were lost": ({"use_dora": True}, without("magnitude"), saying()),
    "one magnitude": ({"use_dora": True}, without("layers.0.self_attn.q_proj.lora_magnitude"), saying()),
    "magnitudes that nobody reads": ({"use_dora": True}, same, saying(use_dora=False)),
    "token rows that nobody reads": (TOKENS, same, saying(trainable_token_indices=None)),
    "a kind that was lost": ({"target_modules": ["q_proj", "v_proj"]}, without("v_proj"), saying()),
    "targets by default": ({"target_modules": ["q_proj", "k_proj"]}, same, saying(target_modules=None)),
}
READ: dict[str, tuple[Config, Callable[[Tensors], Tensors], Callable[[Config], Config]]] = {
    "plain": ({}, same, saying()),
    "DoRA": ({"use_dora": True}, same, saying()),
    "token rows": (TOKENS, same, saying()),
    "a head": ({"modules_to_save": ["lm_head"]}, same, saying()),
    "a target that the model lacks": ({}, same, saying(target_modules=["q_proj", "v_proj", "c_attn"])),
    "a head that the model lacks": (
        {"modules_to_save": ["lm_head"]},
        same,
        saying(modules_to_save=["score", "lm_head"]),
    ),
}


def folder(path: Path, made: tuple[Config, Callable[[Tensors], Tensors], Callable[[Config], Config]]) -> Path:
    fields, tensors, config = made
    llama().save_pretrained(path / "base")
    adapted = peft.get_peft_model(llama(), lora(task_type="CAUSAL_LM", **fields))
    drawn(adapted, 0.05)
    adapted.save_pretrained(path / "lora")
    weights, settings = path / "lora" / "adapter_model.safetensors", path / "lora" / "adapter_config.json"
    save_file(tensors(load_file(weights)), weights, metadata={"format": "pt"})
    settings.write_text(json.dumps(config(json.loads(settings.read_text()))))
    return path / "lora"


def test_another_adapter_s_name_in_the_names_makes_peft_ignore_them(tmp_path: Path) -> None:
    def named(tensors: Tensors) -> Tensors:
        return {name.replace(".weight", ".policy.weight"): tensor for name, tensor in tensors.items()}

    path = folder(tmp_path, ({}, named, saying()))
    halves = [p for n, p in peft.PeftModel.from_pretrained(llama(), path).named_parameters() if "lora_B" in n]
    assert not any(half.any() for half in halves)
    assert any(
        p.any() for n, p in peft.PeftModel.from_pretrained(llama(), path, "policy").named_parameters() if "B" in n
    )
    (hazard,) = inspect_file(path).hazards
    assert (hazard.code, hazard.what.endswith("it loads them under adapter_name='policy' alone")) == ("LH720", True)
    assert diagnose(path, tool="peft").answers["peft"].effect == "nothing"


def test_a_matrix_inside_an_adapted_layer_is_not_taken_for_a_saved_weight(tmp_path: Path) -> None:
    """LoRA-XS saves B @ R @ A: PEFT passes over R without a word, and B @ A is not what was trained."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"

    def crossed(tensors: Tensors) -> Tensors:
        return {**tensors, f"{layer}.default_lora_latent_mapping.weight": torch.eye(8)}

    path = folder(tmp_path, ({}, crossed, saying()))
    assert any("B @ A is not its whole update" in hazard.what for hazard in inspect_file(path).hazards)
    assert diagnose(path, tool="peft").answers["peft"].strength is None


def test_a_target_without_tensors_is_named_where_no_base_is_given(tmp_path: Path) -> None:
    path = folder(tmp_path, IN_PART["a kind that was lost"])
    assert any(note.startswith("target_modules names v_proj, of which") for note in inspect_file(path).notes)


def test_whole_numbers_are_told_with_what_tools_make_of_them(tmp_path: Path) -> None:
    whole = folder(tmp_path, ({}, lambda tensors: {k: (99 * t).to(torch.int8) for k, t in tensors.items()}, saying()))
    loaded = peft.PeftModel.from_pretrained(llama(), whole)
    layer = loaded.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    stored = load_file(whole / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(layer.lora_B["default"].weight, stored[key].float())
    (what,) = {hazard.what.partition(": has ")[2] for hazard in inspect_file(whole).hazards if "I8" in hazard.what}
    assert what.startswith("dtype I8, a floating-point type is needed: PEFT, LyCORIS and ComfyUI take such whole")


def codes(path: Path) -> set[str]:
    return {hazard.code for hazard in inspect_file(path, base=path.parent / "base").hazards}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_refuses_is_said(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path, REFUSED[kind])
    with pytest.raises((KeyError, re.error, ValueError, AttributeError)):
        peft.PeftModel.from_pretrained(llama(), path)
    assert codes(path) & {"LH720", "LH727"}  # LH727: a pattern that cannot be used


@pytest.mark.parametrize("kind", IN_PART)
def test_what_peft_passes_over_or_starts_anew_is_said(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path, IN_PART[kind])
    peft.PeftModel.from_pretrained(llama(), path)
    assert "LH721" in codes(path)


@pytest.mark.parametrize("kind", READ)
def test_of_what_peft_reads_nothing_is_said(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path, READ[kind])
    peft.PeftModel.from_pretrained(llama(), path)
    assert codes(path).isdisjoint({"LH720", "LH721"})
