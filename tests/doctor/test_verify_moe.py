"""Mixtures of experts of transformers that PEFT merges: stacked in memory, one by one or stacked on disk."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from harness.doctor import inspect_file, repair_file
from harness.doctor.repair.naming import layers_from
from harness.doctor.verify.verify import MergeReport, verify_merge

pytestmark = pytest.mark.filterwarnings("ignore")
Tensors = dict[str, Tensor]
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, head_dim=16)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4)),
}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def stacked(path: Path, tensors: Tensors) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


@pytest.fixture(scope="module", params=MODELS)
def merge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with base, merged and lora as PEFT and transformers write them, and both stacked in one file."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("moe"), MODELS[request.param]().to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    stacked(folder / "base.safetensors", model.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=STACKED)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "lora")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    stacked(folder / "merged.safetensors", merged.state_dict())
    return folder


def verified(folder: Path, base: str = "base", merged: str = "merged", **options: bool) -> MergeReport:
    return verify_merge(folder / base, folder / merged, folder / "lora", **options)  # type: ignore[arg-type]


def test_transformers_keeps_the_experts_one_by_one_on_disk(merge: Path) -> None:
    assert all(".experts.0." in key for key in load_file(merge / "base/model.safetensors") if ".experts.0" in key)
    assert any(key.endswith(".experts.gate_up_proj") for key in load_file(merge / "base.safetensors"))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("base", ["base", "base.safetensors"])
@pytest.mark.parametrize("merged", ["merged", "merged.safetensors"])
def test_a_right_merge_is_right_however_base_and_merged_keep_their_experts(
    merge: Path, base: str, merged: str, full: bool
) -> None:
    report = verified(merge, base, merged, full=full)
    assert (report.exit_code, len(report.modules)) == (0, 6), report.overall.text()


def test_the_base_has_every_module(merge: Path) -> None:
    shares = []
    for base in ("base", "base.safetensors"):
        record = inspect_file(merge / "lora", base=merge / base)
        assert record.codes == ()
        assert record.fit is not None
        assert (record.fit.applied, record.fit.missing_total) == (6, 0)
        shares.append({name: energy.relative for name, energy in record.energies.items()})
    assert shares[0] == pytest.approx(shares[1])


EDITS: dict[str, tuple[Callable[[Tensors, Tensors], None], str]] = {}


def edit(code: str) -> Callable[[Callable[[Tensors, Tensors], None]], Callable[[Tensors, Tensors], None]]:
    def register(change: Callable[[Tensors, Tensors], None]) -> Callable[[Tensors, Tensors], None]:
        EDITS[change.__name__] = change, code
        return change

    return register


def of(tensors: Tensors, pattern: str) -> list[str]:
    found = [name for name in tensors if re.search(pattern, name)]
    assert found
    return found


@edit("LH102")
def one_expert_left_out(merged: Tensors, base: Tensors) -> None:
    for name in of(merged, r"layers\.1\..*experts\.2\.(gate_proj|up_proj|w1|w3)"):
        merged[name] = base[name]


@edit("LH102")
def every_gate_left_out(merged: Tensors, base: Tensors) -> None:
    for name in of(merged, r"experts\.\d\.(gate_proj|w1)\."):
        merged[name] = base[name]


@edit("LH104")
def experts_exchanged(merged: Tensors, base: Tensors) -> None:
    for name in of(merged, r"experts\.0\."):
        other = name.replace("experts.0.", "experts.1.")
        changes = [merged[one].float() - base[one].float() for one in (other, name)]
        merged[name], merged[other] = (
            (base[n].float() + c).bfloat16() for n, c in zip((name, other), changes, strict=True)
        )


@edit("LH401")
def a_router_edited(merged: Tensors, base: Tensors) -> None:
    merged[of(merged, r"layers\.0\..*\.gate\.weight")[0]] += 0.05


@edit("LH502")
def one_expert_not_finite(merged: Tensors, base: Tensors) -> None:
    merged[of(merged, r"layers\.0\..*experts\.3\.(down_proj|w2)")[0]][5, 5] = torch.nan


@pytest.mark.parametrize("fault", EDITS)
def test_a_wrong_merge_is_found_where_the_experts_are_kept_one_by_one(merge: Path, fault: str, tmp_path: Path) -> None:
    change, code = EDITS[fault]
    merged, base = (load_file(merge / name / "model.safetensors") for name in ("merged", "base"))
    change(merged, base)
    stacked(tmp_path / "merged.safetensors", merged)
    report = verify_merge(merge / "base", tmp_path / "merged.safetensors", merge / "lora", full=True)
    assert (report.exit_code, report.overall.code) == (1, code), report.overall.text()


@pytest.fixture(scope="module")
def one_by_one(merge: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """Return a LoRA of every expert's own layers, as older transformers let PEFT train it, and the right merge."""
    folder, weights = tmp_path_factory.mktemp("one"), load_file(merge / "base/model.safetensors")
    merged, lora = dict(weights), {}
    for name in of(weights, r"experts\.\d\.\w+\.weight"):
        rows, columns = weights[name].shape
        a, b = torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.05
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        lora |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        merged[name] = (weights[name].float() + 2 * b @ a).bfloat16()
    (folder / "lora").mkdir()
    stacked(folder / "lora/adapter_model.safetensors", lora)
    targets = sorted({name.split(".")[-2] for name in weights if ".experts." in name})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    stacked(folder / "merged.safetensors", merged)
    return folder, merged


def test_a_lora_of_single_experts_is_judged_on_stacked_ones(merge: Path, one_by_one: tuple[Path, Tensors]) -> None:
    folder, right = one_by_one
    base = load_file(merge / "base.safetensors")
    fused = dict(base)
    for name in of(base, r"experts\.(gate_up|down)_proj$"):
        own = name.replace(".mlp.", ".block_sparse_moe.") if any("block_sparse" in key for key in right) else name
        owner = own.rpartition(".")[0]
        names = [["gate_proj", "up_proj"], ["w1", "w3"]] if "gate_up" in name else [["down_proj"], ["w2"]]
        parts = next(some for some in names if f"{owner}.0.{some[0]}.weight" in right)
        fused[name] = torch.stack(
            [torch.cat([right[f"{owner}.{e}.{part}.weight"] for part in parts]) for e in range(4)]
        )
    stacked(folder / "fused.safetensors", fused)
    for base_name, merged in (("base", "merged"), ("base.safetensors", "fused")):
        report = verify_merge(merge / base_name, folder / f"{merged}.safetensors", folder / "lora")
        assert (report.exit_code, len(report.modules)) == (0, 24), report.overall.text()
        record = inspect_file(folder / "lora", base=merge / base_name)
        assert record.fit is not None
        assert record.fit.applied == 24
    name = of(fused, r"layers\.1\..*experts\.gate_up_proj")[0]
    fused[name][3, 48:] = base[name][3, 48:]
    stacked(folder / "wrong.safetensors", fused)
    report = verify_merge(merge / "base.safetensors", folder / "wrong.safetensors", folder / "lora")
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()
    assert [verdict.worst_module for verdict in report.modules if not verdict.ok] == [
        verdict.worst_module
        for verdict in report.modules
        if re.search(r"layers\.1\..*experts\.3\.(up_proj|w3)", verdict.worst_module or "")
    ]


def test_repair_keeps_the_names_of_stacked_experts(merge: Path, tmp_path: Path) -> None:
    repair_file(merge / "lora", "peft", tmp_path / "fixed", model_names=layers_from(merge / "base"))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (merge / "lora", tmp_path / "fixed"))
    assert before.keys() == after.keys()
