"""What PEFT merges is right for every kind of adapter and dtype; what it would not merge is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from harness.doctor.verify.verify import verify_merge
from tests.doctor.peft_merges import METHODS, Change, gpt2, llama, lora, lost, scaled, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of which each method has some
LAYERS = {"ia3": "mlp.down_proj", "ln_tuning": "input_layernorm"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", METHODS)
def test_what_peft_merges_of_another_method_is_right(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    report = verify_merge(*write(tmp_path, llama(), METHODS[kind](), dtype=dtype))
    assert report.exit_code == 0, report.overall.text()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", METHODS)
def test_a_layer_that_was_not_merged_is_named(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    layer = {"ia3": "layers.1.mlp.down_proj", "ln_tuning": "layers.1.input_layernorm"}.get(
        kind, "layers.1.self_attn.q_proj"
    )
    paths = write(tmp_path, llama(), METHODS[kind](), dtype=dtype, change=lost(layer))
    report = verify_merge(*paths)
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()
    assert [layer in (verdict.worst_module or "") for verdict in report.modules if not verdict.ok] == [True]


@pytest.mark.parametrize("kind", METHODS)
def test_a_layer_merged_at_another_strength_is_wrong(tmp_path: Path, kind: str) -> None:
    layer = LAYERS.get(kind, "self_attn.q_proj")
    paths = write(tmp_path, llama(), METHODS[kind](), dtype=torch.bfloat16, change=scaled(layer, 2))
    report = verify_merge(*paths)
    assert report.exit_code == 1, report.overall.text()


STORED_THE_OTHER_WAY = {
    "an embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "GPT-2's Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, "h.0.attn.c_attn"),
    "a square Conv1D": (gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}, "h.0.attn.c_proj"),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", STORED_THE_OTHER_WAY)
def test_a_dora_is_judged_in_layers_that_are_stored_the_other_way_round(tmp_path: Path, kind: str, full: bool) -> None:
    model, fields, layer = STORED_THE_OTHER_WAY[kind]
    right = write(tmp_path, model(), lora(use_dora=True, **fields))
    report = verify_merge(*right, full=full)
    assert report.exit_code == 0, report.overall.text()
    (tmp_path / "wrong").mkdir()
    wrong = write(tmp_path / "wrong", model(), lora(use_dora=True, **fields), change=scaled(layer, 1.5))
    report = verify_merge(*wrong, full=full)
    assert report.exit_code == 1, report.overall.text()


BIASES = {
    "a bias that was left as the base's": lost("layers.1.self_attn.q_proj.bias"),
    "twice what is added": scaled("layers.1.self_attn.q_proj.bias", 2),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("trained", ["all", "lora_only"])
def test_a_bias_that_is_trained_and_added_to_is_judged(tmp_path: Path, trained: str, full: bool) -> None:
    config = lora(lora_bias=True, bias=trained)
    report = verify_merge(*write(tmp_path, llama(bias=True), config), full=full)
    assert report.exit_code == 0, report.overall.text()


@pytest.mark.parametrize("wrong", BIASES)
def test_a_bias_that_is_trained_and_added_to_is_wrong(tmp_path: Path, wrong: str) -> None:
    paths = write(tmp_path, llama(bias=True), lora(lora_bias=True, bias="all"), change=BIASES[wrong])
    report = verify_merge(*paths)
    assert report.exit_code == 1
    assert "layers.1.self_attn.q_proj (bias)" in report.overall.text()


UNTOLD = {
    "frod without its projection": lambda: peft.FrodConfig(target_modules=["q_proj", "v_proj"], save_projection=False),
    "tinylora of several vectors": lambda: peft.TinyLoraConfig(target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_what_hangs_on_all_layers_is_not_judged(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, llama(), UNTOLD[kind]())
    capfd.readouterr()
    report = verify_merge(*paths)
    assert report.exit_code == 3
    assert "PEFT's own merge of the whole model would decide" in report.overall.text()
    assert not capfd.readouterr().err


def test_a_method_that_changes_biases_alone_is_judged(tmp_path: Path) -> None:
    beft = peft.BeftConfig(target_modules=["q_proj", "v_proj"])
    report = verify_merge(*write(tmp_path, llama(bias=True), beft))
    assert (report.exit_code, len(report.modules)) == (0, 4), report.overall.text()


def _magnitudes_alone(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
        if "magnitude" in name:
            parameter.data.mul_(1.3)


MAGNITUDES = {
    "as PEFT merges them": (lambda merged, base: None, 0),
    "not merged": (lost("layers.1.self_attn.q_proj"), 1),
    "half": (scaled("layers.1.self_attn.q_proj", 0.5), 1),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", MAGNITUDES)
def test_a_dora_of_which_only_the_magnitudes_are_trained_is_judged(tmp_path: Path, kind: str, full: bool) -> None:
    change, code = MAGNITUDES[kind]
    paths = write(tmp_path, llama(), lora(use_dora=True), change=change, before=_magnitudes_alone)
    report = verify_merge(*paths, full=full)
    assert report.exit_code == code, report.overall.text()


@pytest.mark.parametrize("change", [None, lost("classifier.bias")])
def test_a_bias_that_peft_saves_under_two_names_is_judged(tmp_path: Path, change: Change | None) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=64))
    config = lora(target_modules=["query"], bias="all", task_type="SEQ_CLS")
    report = verify_merge(*write(tmp_path, model, config, change=change))
    assert report.exit_code == (1 if change else 0), report.overall.text()
