"""Folders as PEFT writes them that a base must not be said to lack, and a start of training that changes the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest

from harness.doctor import inspect_file
from harness.doctor.verify.verify import verify_merge
from tests.doctor.peft_merges import llama, lora, write

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS: dict[str, tuple[Callable[[], peft.PeftConfig], int]] = {
    "vera": (lambda: peft.VeraConfig(target_modules=["q_proj"], r=8), 2),
    "randlora": (lambda: peft.RandLoraConfig(target_modules=["q_proj"]), 2),
    "prompt tuning": (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), 0),
    "prefix tuning": (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), 0),
    "layers used twice": (lambda: lora(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]), 2),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_has_no_layer_of_its_own_is_not_missing_from_the_base(method: str, tmp_path: Path) -> None:
    make, applied = METHODS[method]
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, make())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(tmp_path / "lora")
    record = inspect_file(tmp_path / "lora", base=tmp_path / "base")
    assert record.codes == (), record.hazards
    assert record.fit is not None
    assert record.fit.applied == applied


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_merge_of_what_changed_the_base_too_is_not_judged(init: str, tmp_path: Path) -> None:
    report = verify_merge(*write(tmp_path, llama(), lora(init_lora_weights=init)))
    assert report.exit_code == 3, report.overall.text()
    assert "which changes the base too" in report.overall.text()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_passed_off_as_such_a_merge_is_wrong(init: str, tmp_path: Path) -> None:
    base, _, adapter = write(tmp_path, llama(), lora(init_lora_weights=init))
    report = verify_merge(base, base, adapter)
    assert report.exit_code == 1
    assert report.overall.code == "LH101", report.overall.text()
