"""Folders as PEFT writes them that a base must not be said to lack, and a start of training that changes the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig

from harness.doctor import inspect_file
from harness.doctor.diagnose import diagnose
from harness.doctor.repair.repair import repair_file
from harness.doctor.told import lines
from harness.doctor.verify.verify import verify_merge
from harness.errors import UserError
from tests.doctor.peft_merges import llama, lora, scaled, write

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


OPTIONS: dict[str, Callable[[], peft.PeftConfig]] = {
    "kasa": lambda: lora(target_modules=["q_proj"], kasa_config=KasaConfig()),
    "monteclora": lambda: lora(monteclora_config=MontecloraConfig()),
    "velora": lambda: lora(velora_config={}),
    "bdlora": lambda: lora(
        target_modules=["q_proj", "o_proj"],
        use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_make_another_update_of_a_pair_are_read_and_judged_by_peft(option: str, tmp_path: Path) -> None:
    paths = write(tmp_path, llama(), OPTIONS[option]())
    record = inspect_file(paths[2], base=paths[0])
    assert (set(record.variants), record.trained, record.coverage) == ({option}, (2.0, 2.0), 1.0)
    assert {hazard.code for hazard in record.hazards} <= {"LH723"}, record.hazards
    assert verify_merge(*paths).exit_code == 0
    (tmp_path / "wrong").mkdir()
    wrong = verify_merge(*write(tmp_path / "wrong", llama(), OPTIONS[option](), change=scaled("layers.1", 1.5)))
    assert wrong.exit_code == 1, wrong.overall.text()


@pytest.mark.parametrize("tool", ["vllm", "sglang"])
def test_nobody_answers_for_an_option_that_was_not_measured(tool: str, tmp_path: Path) -> None:
    _, _, folder = write(tmp_path, llama(), OPTIONS["bdlora"]())
    assert diagnose(folder, tool=tool).answers[tool].strength is None


PROMPTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}


@pytest.mark.parametrize("method", PROMPTS)
def test_what_adapts_no_single_layer_is_no_file_of_another_model(method: str, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, PROMPTS[method]()).save_pretrained(tmp_path / "lora")
    assert inspect_file(tmp_path / "lora", base=tmp_path / "base").codes in ((), ("LH713",))
    report = verify_merge(tmp_path / "base", tmp_path / "base", tmp_path / "lora")
    assert (report.exit_code, "may have no merge at all" in report.overall.text()) == (3, True)


def test_layers_that_share_one_vector_are_not_judged_and_the_others_must_be_the_base_s(tmp_path: Path) -> None:
    """UniLoRA saves a vector, out of which PEFT draws the parameters of all layers."""
    config = peft.UniLoraConfig(target_modules=["q_proj"], r=4)
    report = verify_merge(*write(tmp_path, llama(), config))
    assert report.exit_code == 3
    assert "2 NOT JUDGED" in report.overall.title
    assert "merge of the whole model would decide" in report.overall.text()
    name = "model.layers.0.self_attn.v_proj.weight"
    edited = write(tmp_path / "edited", llama(), config, change=lambda merged, base: merged[name].mul_(1.5))
    assert verify_merge(*edited).overall.code == "LH401"


def test_the_null_of_a_method_that_peft_itself_saves_is_no_hazard(tmp_path: Path) -> None:
    base, _, folder = write(tmp_path, llama(), peft.OSFConfig(target_modules=["q_proj"]))
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"] is None
    assert inspect_file(folder, base=base).codes == ()


def test_a_method_without_a_scale_has_no_number_to_pass(tmp_path: Path) -> None:
    _, _, folder = write(tmp_path, llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    said = dict(lines(diagnose(folder, tool="peft")))
    assert said["file"].endswith("no rank and no alpha")
    assert said["pass"] == "nothing to pass: ia3 has no strength"


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"ensure_weight_tying": True}], ids=str)
def test_a_tied_head_is_not_missing_from_its_base(fields: dict[str, object], tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens"] if "ensure_weight_tying" in fields else ["q_proj"]
    base, _, folder = write(tmp_path, llama(tie=True), lora(target_modules=targets, **fields))
    assert inspect_file(folder, base=base).codes == ()
    assert diagnose(folder, tool="peft").answers["peft"].effect == "law"


def _begun(folder: Path, init: str) -> Path:
    """A folder whose configuration says that training began so."""
    _, _, adapter = write(folder, llama(), lora())
    said = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(said | {"init_lora_weights": init}), encoding="utf-8")
    return adapter


@pytest.mark.parametrize(("init", "changes"), [("pissa", True), ("olora", True), ("lora_ga", False), ("corda", None)])
@pytest.mark.parametrize("tool", ["peft", "transformers"])
def test_what_peft_does_again_to_the_base_is_what_is_said(
    tool: str, init: str, changes: bool | None, tmp_path: Path
) -> None:
    adapter = _begun(tmp_path, init)
    given = diagnose(adapter, tool=tool).answers[tool]
    if changes is None:
        assert (given.effect, given.strength) == ("raises", None)
        with pytest.raises(ValueError, match="eigens"):
            peft.PeftModel.from_pretrained(llama(), adapter)
        return
    loaded = peft.PeftModel.from_pretrained(llama(), adapter)
    weight = loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(weight, llama().model.layers[0].self_attn.q_proj.weight) is not changes
    assert (given.effect, given.strength) == (("law", 1.0) if changes else ("wrong", None))


def test_a_folder_of_token_rows_alone_has_no_scale_to_repair(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"])
    _, _, folder = write(tmp_path, llama(), config)
    with pytest.raises(UserError, match="is a trainable_tokens module, whose scale is no alpha / rank"):
        repair_file(folder, "peft", tmp_path / "new")
