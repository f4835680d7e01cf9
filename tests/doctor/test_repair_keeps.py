"""A repair of a PEFT folder does in PEFT what the training did, and loses nothing that was trained or configured."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from harness.doctor import repair_file
from harness.errors import UserError

TARGETS = ["q_proj", "v_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
KINDS: dict[str, Any] = {
    "plain": peft.LoraConfig(**LORA),
    "head": peft.LoraConfig(**LORA, modules_to_save=["lm_head", "model.norm"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices=[1, 3]),
    "biases": peft.LoraConfig(**LORA, bias="all"),
    "biases of the adapted": peft.LoraConfig(**LORA, bias="lora_only"),
    "bias of B": peft.LoraConfig(**LORA, lora_bias=True),
    "embedding": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "rslora": peft.LoraConfig(**LORA, use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 2}),
    "expression": peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(q|v)_proj", alpha_pattern={"q_proj": 3}),
    "one layer": peft.LoraConfig(**LORA, layers_to_transform=[1], layers_pattern="layers"),
    "parameter": peft.LoraConfig(**LORA, target_parameters=["mlp.up_proj.weight"]),
    "loha": peft.LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, alpha=8, target_modules=TARGETS),
    "lokr of full factors": peft.LoKrConfig(r=400, alpha=100, target_modules=TARGETS),
}


def base(kind: type = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=3, pad_token_id=0, attention_bias=True,
    )  # fmt: skip
    return kind(config).eval()


def trained(folder: Path, config: Any, kind: type = LlamaForCausalLM) -> Path:
    """Save an adapter in which everything that is trained has random values."""
    model = peft.get_peft_model(base(kind), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings that go along, and of biases that are no matrices
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def answer(folder: Path | str, kind: type = LlamaForCausalLM) -> Tensor:
    """Return what the model says with the adapter, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base(kind), str(folder)).eval()
    return model(torch.arange(12)[None]).logits.double()


@torch.no_grad()
def same(new: Path | str, wanted: Tensor, kind: type = LlamaForCausalLM) -> bool:
    change = wanted - base(kind)(torch.arange(12)[None]).logits.double()
    assert change.abs().max() > 1e-3
    return float((answer(new, kind) - wanted).abs().max()) < 1e-5 * float(change.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_peft_says_the_same_with_the_repaired_adapter(tmp_path: Path, kind: str) -> None:
    source = trained(tmp_path / "old", KINDS[kind])
    report = repair_file(source, "peft", tmp_path / "new")
    assert same(report.path, answer(source))
    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (source, tmp_path / "new"))
    scale = {"lora_alpha", "alpha", "alpha_pattern", "use_rslora"}
    assert {name: value for name, value in new.items() if name not in scale} == {
        name: value for name, value in old.items() if name not in scale
    }
    assert new.get("lora_alpha", new.get("alpha")) == new["r"]


def test_a_classifier_goes_along(tmp_path: Path) -> None:
    kind = LlamaForSequenceClassification
    source = trained(tmp_path / "old", peft.LoraConfig(**LORA, task_type="SEQ_CLS"), kind)
    report = repair_file(source, "peft", tmp_path / "new")
    assert report.carried == 1
    assert "score.weight" in report.notes[0]
    assert same(report.path, answer(source, kind), kind)


LOST = {"head": 2, "tokens": 1, "biases": 6, "embedding": 4, "dora": 12, "parameter": 4, "loha": 16}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("to", ["diffsynth", "kohya", "mlx"])
def test_another_format_without_a_place_for_it_is_refused_with_the_keys(tmp_path: Path, kind: str, to: str) -> None:
    source = trained(tmp_path / "old", KINDS[kind])
    with pytest.raises(UserError, match="no place in a") as refused:
        repair_file(source, to, tmp_path / "new")
    assert any(key in str(refused.value) for key in load_file(source / WEIGHTS))
    assert "--to peft keeps all of them" in str(refused.value)
    assert not list(tmp_path.glob("new*"))


def renamed(source: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(source / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, source / WEIGHTS)


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "distributed": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "bare": lambda key: key.removeprefix("base_model.model."),
    "of a live model": lambda key: (
        key.replace("lora_A.", "lora_A.default.")
        .replace("lora_B.", "lora_B.default.")
        .replace("lm_head.", "lm_head.modules_to_save.default.")
        .replace("model.norm.weight", "model.norm.modules_to_save.default.weight")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_left_out_and_peft_reads_the_file(tmp_path: Path, wrapper: str) -> None:
    source = trained(tmp_path / "old", KINDS["head"])
    wanted = answer(source)
    renamed(source, WRAPPED[wrapper])
    report = repair_file(source, "peft", tmp_path / "new")
    assert report.carried == 2
    assert same(report.path, wanted)


def test_targets_that_leave_modules_out_are_written_one_by_one(tmp_path: Path) -> None:
    source = trained(tmp_path / "old", KINDS["plain"])
    wanted = answer(source)
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**config, "target_modules": ["query", "v_proj"]}))
    assert same(repair_file(source, "peft", tmp_path / "new").path, wanted)


def test_alpha_0_is_refused_and_the_given_one_counts(tmp_path: Path) -> None:
    source = trained(tmp_path / "old", KINDS["plain"])
    wanted = answer(source)
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**config, "lora_alpha": 0}))
    with pytest.raises(UserError, match="alpha is 0"):
        repair_file(source, "peft", tmp_path / "new")
    assert same(repair_file(source, "peft", tmp_path / "new", lora_alpha=8.0).path, wanted)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))


class Mixture(nn.Module):
    """Two layers of three experts each beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.experts = nn.Linear(6, 6), Experts()
        self.config = {"model_type": "none"}


def merged(folder: Path | str) -> dict[str, Tensor]:
    model = peft.PeftModel.from_pretrained(Mixture(), str(folder)).merge_and_unload()
    return model.state_dict()


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
def test_experts_of_a_parameter_keep_their_effect(tmp_path: Path, targets: list[str]) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets)
    model = peft.get_peft_model(Mixture(), config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) if parameter.requires_grad else parameter.data
    model.save_pretrained(tmp_path / "old")
    wanted = merged(tmp_path / "old")
    report = repair_file(tmp_path / "old", "peft", tmp_path / "new")
    assert report.modules == 1 + len(targets)
    for name, weight in merged(report.path).items():
        assert torch.allclose(weight, wanted[name], atol=1e-5)
    assert not torch.allclose(wanted["experts.down_proj"], Mixture().experts.down_proj)


def test_a_method_without_a_scale_is_refused_by_its_name(tmp_path: Path) -> None:
    source = trained(tmp_path / "old", peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]))
    with pytest.raises(UserError, match="ia3"):
        repair_file(source, "peft", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("field", [{"init_lora_weights": "pissa_niter_4"}, {"alora_invocation_tokens": [1, 2]}])
def test_what_only_the_configuration_does_stays_in_it(tmp_path: Path, field: dict[str, object]) -> None:
    source = trained(tmp_path / "old", KINDS["plain"])
    config = json.loads((source / CONFIG).read_text()) | field
    (source / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=next(iter(field))):
        repair_file(source, "diffsynth", tmp_path / "new")
    repair_file(source, "peft", tmp_path / "new")
    assert json.loads((tmp_path / "new" / CONFIG).read_text()).items() >= field.items()
