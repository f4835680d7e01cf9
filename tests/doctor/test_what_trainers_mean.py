"""What a trainer did, and no key of the file says by itself, decides what is right: alphas, bases, wrappers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.doctor.answer import Answer, Question
from harness.doctor.answers import answer
from harness.doctor.inspect.describe import inspect_file
from harness.doctor.repair.repair import repair_file
from harness.doctor.traits import Traits
from harness.errors import UserError
from harness.files import read_lora
from harness.law.known import tools

SPLIT = {
    "ss_network_module": "networks.lora_flux", "ss_network_dim": "4", "ss_network_alpha": "2.0",
    "ss_network_args": json.dumps({"split_qkv": "True"}),
}  # fmt: skip
LLAMA = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]


def said(path: Path, tool: str) -> Answer:
    return answer(tools()[tool], Traits(read_lora(path, strict=False)), Question())


def flux(path: Path, alpha: float, metadata: Mapping[str, str] | None = None) -> Path:
    """Write q, k and v of rank 4 each as one pair of rank 12, beside a plain pair of rank 4 and alpha 2."""
    tensors: dict[str, Tensor] = {}
    for name, rank, rows, b in (
        ("double_blocks_0_img_attn_qkv", 12, 24, torch.block_diag(*[torch.randn(8, 4) for _ in range(3)])),
        ("double_blocks_0_img_attn_proj", 4, 8, torch.randn(8, 4)),
    ):
        stem = f"lora_unet_{name}"
        tensors |= {f"{stem}.lora_down.weight": torch.randn(rank, 8), f"{stem}.lora_up.weight": b}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha if rows == 24 else 2.0)
    save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    return path


def peft(folder: Path, prefix: str = "base_model.model.", **config: Any) -> Path:
    folder.mkdir()
    tensors = {f"{prefix}{name}.lora_A.weight": torch.randn(2, 8) for name in LLAMA}
    save_file(
        tensors | {f"{prefix}{name}.lora_B.weight": torch.randn(8, 2) for name in LLAMA},
        folder / "adapter_model.safetensors",
    )
    own = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "task_type": "CAUSAL_LM",
        "target_modules": [f"{p}_proj" for p in "qkvo"],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**own, **config}))
    return folder


def test_projections_that_were_trained_apart_have_the_scale_of_their_own_rank(tmp_path: Path) -> None:
    path = flux(tmp_path / "lora.safetensors", 2.0, SPLIT)
    given = said(path, "comfyui")
    assert (given.effect, given.strength, given.gain) == ("factor", None, pytest.approx((1 / 3, 1)))
    (hazard,) = (each.what for each in inspect_file(path).hazards if each.code == "LH704")
    assert "trained at alpha / 4 (split_qkv), while every tool divides by 12: 1/3 of the effect" in hazard
    repair_file(path, "kohya", tmp_path / "out.safetensors")
    old, new = load_file(path), load_file(tmp_path / "out.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    exact = 2.0 / 4 * old[f"{stem}.lora_up.weight"] @ old[f"{stem}.lora_down.weight"]
    found = new[f"{stem}.lora_up.weight"] @ new[f"{stem}.lora_down.weight"] * new[f"{stem}.alpha"] / 12
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6)


def test_a_converter_that_multiplied_alpha_is_right_as_it_is(tmp_path: Path) -> None:
    path = flux(tmp_path / "lora.safetensors", 6.0, SPLIT)
    assert said(path, "comfyui").strength == 1
    (hazard,) = (each.what for each in inspect_file(path).hazards if each.code == "LH704")
    assert "one that a converter multiplied by 3 is right" in hazard


def test_an_alpha_beside_two_full_factors_may_be_anything(tmp_path: Path) -> None:
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    for alpha in (float("inf"), float("nan"), 16.0):
        tensors = {f"{stem}.lokr_w1": torch.randn(4, 4), f"{stem}.lokr_w2": torch.randn(4, 4)}
        save_file(tensors | {f"{stem}.alpha": torch.tensor(alpha).half()}, tmp_path / "lora.safetensors")
        record = inspect_file(tmp_path / "lora.safetensors")
        assert (record.codes, record.modules) == ((), 1)
        assert said(tmp_path / "lora.safetensors", "comfyui").strength == 1


def test_a_base_that_the_start_changed_is_wrong_where_nothing_repeats_that(tmp_path: Path) -> None:
    for init in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga"):
        assert said(peft(tmp_path / init, init_lora_weights=init), "sglang").effect == "wrong"
    assert said(peft(tmp_path / "gaussian", init_lora_weights="gaussian"), "sglang").effect == "law"
    with pytest.raises(UserError, match="olora: PEFT takes the start from the base times alpha / rank"):
        repair_file(tmp_path / "olora", "peft", tmp_path / "out")


def test_an_activated_lora_is_what_peft_alone_makes_of_it(tmp_path: Path) -> None:
    folder = peft(tmp_path / "lora", alora_invocation_tokens=[1, 2])
    assert (said(folder, "transformers").effect, said(folder, "transformers").instead) == ("nothing", None)
    assert said(folder, "sglang").effect == "wrong"
    assert said(folder, "peft").effect == "law"


def test_a_prefix_that_stands_there_twice_is_a_wrapper_that_no_model_has(tmp_path: Path) -> None:
    folder = peft(tmp_path / "lora", "base_model.model.base_model.model.")
    assert {said(folder, tool).effect for tool in ("peft", "vllm")} == {"nothing"}
    assert said(folder, "transformers").effect == "law"  # it takes away what stands there, however often


def test_magnitudes_under_another_name_are_not_those_that_were_measured(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{stem}.lora_A.weight": torch.randn(2, 8), f"{stem}.lora_B.weight": torch.randn(8, 2)}
    effects = {}
    for tail in ("lora_magnitude_vector", "magnitude"):
        save_file(pair | {f"{stem}.{tail}": torch.rand(8)}, tmp_path / "lora.safetensors")
        effects[tail] = said(tmp_path / "lora.safetensors", "diffusers").effect
    assert effects["magnitude"] == "unknown" != effects["lora_magnitude_vector"]
