"""Engines that give only outputs: made of the reference with another law, they must be told from the right one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import loader
from harness.benches import get_bench
from harness.checks.cell import Cell, cells_of
from harness.checks.engine import base_folder, inputs_of
from harness.checks.observation import probes_of
from harness.checks.outputs import _Reference, judge_outputs, observe_outputs
from harness.checks.plan import planned
from harness.checks.run import check_loader
from harness.errors import LoaderSpecError
from harness.example import Example, Target
from harness.files import read_lora
from harness.isolation.limits import Limits
from harness.law.diagnosis import diagnose
from harness.loaders.registry import resolve
from harness.variants import get_variant

EXAMPLE = Path(__file__).parents[2] / "examples" / "outputs_command.py"
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj")


def engine(law, **faults):
    return resolve(loader(outputs=True)(law_of(law, **faults)))


def law_of(law, *, offset=0.0, wrong=False, weights=1.0):
    """An engine whose factor on B @ A is `law(alpha, rank, strength)`; `offset` is the relative error of its own."""

    def answer(base, lora, *, strength, inputs):
        model = get_bench("tiny-llama").build()
        generator = torch.Generator().manual_seed(3)
        adapter = read_lora(lora)
        for name, module in adapter.modules.items():
            layer = model.get_submodule(name)
            factor = law(module.alpha, module.rank, strength)
            a, b = adapter.tensors(name)
            change = (b @ a).flip(0) if wrong else b @ a
            layer.weight.data = weights * layer.weight.data + factor * change.float()
        with torch.no_grad():
            logits = model(**inputs).logits
        return logits + offset * logits.norm() / logits.numel() ** 0.5 * torch.randn(logits.shape, generator=generator)

    return answer


def observed(subject, *, alpha=6.0, rank=4, strength=0.5, layer=LAYERS[0]):
    cell = Cell(subject, "peft", "tiny-llama")
    return observe_outputs(cell, Example((Target(layer, rank, alpha),), strength))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("offset", [0.0, 3e-4])
def test_the_scale_is_read_from_the_outputs(layer, offset):
    seen = observed(engine(lambda a, r, s: s * a / r, offset=offset), layer=layer)
    (fit,) = seen.fits[layer]
    assert fit.scale == pytest.approx(0.75, rel=1e-4 if not offset else 0.02)
    assert fit.scale_right
    assert judge_outputs(seen) == []


RIVALS = {
    "alpha not divided": (lambda a, r, s: s * a, "LH201"),
    "alpha ignored": (lambda a, r, s: s, "LH202"),
    "divided by the root of the rank": (lambda a, r, s: s * a / r**0.5, "LH203"),
    "strength ignored": (lambda a, r, s: a / r, "LH207"),
    "strength squared": (lambda a, r, s: s * s * a / r, "LH207"),
}


def diagnosed(subject):
    """The law behind the planned files, measured in this process."""
    cell = Cell(subject, "peft", "tiny-llama")
    seen = [observe_outputs(cell, example) for example in planned(cell)]
    assert not any(each.raised for each in seen)
    probes = [probe for each in seen for probe in probes_of(each, cell)]
    assert len(probes) > 7
    return diagnose(probes)


@pytest.mark.parametrize("rival", RIVALS)
def test_another_law_is_named(rival):
    law, code = RIVALS[rival]
    assert diagnosed(engine(law, offset=1e-4)).code == code


def test_the_trained_law_is_named_with_an_error_of_the_engine_s_own():
    found = diagnosed(engine(lambda a, r, s: s * a / r, offset=3e-4))
    assert found.law is not None
    assert found.law.is_trained


def test_alpha_0_that_acts_as_1_is_told_and_no_fault():
    seen = observed(engine(lambda a, r, s: s * (a / r if a else 1.0)), alpha=0.0)
    assert seen.fits[LAYERS[0]][0].scale == pytest.approx(0.5, rel=1e-4)
    assert seen.zero_alpha == {"as the rank"}
    assert judge_outputs(seen) == []


def test_a_lora_without_effect_is_found():
    (finding,) = judge_outputs(observed(engine(lambda a, r, s: 0.0)))
    assert finding.code == "LH101"


def test_outputs_that_no_scale_explains_are_no_scale():
    (finding,) = judge_outputs(observed(engine(lambda a, r, s: s * a / r, wrong=True)))
    assert finding.code == "LH306"
    assert "no scale of B @ A gives these outputs" in finding.fact


def test_another_model_is_not_judged():
    seen = observed(engine(lambda a, r, s: s * a / r, weights=1.3))
    assert seen.raised is not None
    assert "without a LoRA its outputs are" in seen.raised.what
    assert "no scale can be told from them" in seen.raised.what


def test_an_output_of_another_shape_is_said():
    @loader(outputs=True)
    def answer(base, lora, *, strength, inputs):
        return torch.zeros(1, 40)

    seen = observed(resolve(answer))
    assert seen.raised is not None
    assert seen.raised.what == "the engine answers [1, 40], but should answer [1, 6, 40]"


def test_an_engine_may_answer_with_an_array_of_numpy():
    right = law_of(lambda alpha, rank, strength: strength * alpha / rank)
    found = observed(resolve(loader(outputs=True)(lambda *args, **words: right(*args, **words).numpy())))
    assert all(fits[0].scale_right for fits in found.fits.values())


@pytest.mark.parametrize("answer", ["hello", None, {"logits": 1}])
def test_what_is_no_tensor_is_no_fault_of_a_name(answer):
    found = observed(resolve(loader(outputs=True)(lambda base, lora, *, strength, inputs: answer)))
    assert found.raised.code == "LH902"
    assert found.raised.what == f"the engine answers {type(answer).__name__}, but should answer a tensor"


def test_the_reference_is_peft(tmp_path):
    """f(s) is what PEFT answers with the same module at the scale s."""
    from peft import PeftModel

    bench = get_bench("tiny-llama")
    cell = Cell(resolve(lambda model, lora, *, strength=1.0: None), "peft", "tiny-llama")
    example = Example((Target(LAYERS[1], 3, 7.5),), 1.0)
    base = cell.view.gather({n: bench.base().get_submodule(n).weight.double() for n in bench.layers})
    update = get_variant("lora").updates(example, cell.view, base)[LAYERS[1]]
    from harness.checks.trial_files import write_example

    path = write_example(cell, example, {LAYERS[1]: update}, tmp_path)
    peft = bench.forward(PeftModel.from_pretrained(bench.build(), path).eval()).double()
    assert torch.allclose(_Reference(bench, LAYERS[1], update).at(2.5), peft, atol=1e-5)


def test_what_the_model_is_called_with_is_written():
    inputs = inputs_of(get_bench("tiny-llama"))
    assert {name: list(value.shape) for name, value in inputs.items()} == {"input_ids": [1, 6]}
    folder = base_folder("tiny-llama")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert len(load_file(folder / "model.safetensors")) == len(get_bench("tiny-llama").base().state_dict())


def test_a_command_is_checked_like_any_loader(monkeypatch):
    monkeypatch.setenv("LORA_HARNESS_COMMAND_SECONDS", "900")  # it imports peft and transformers, twice
    spec = f"outputs:python '{EXAMPLE}' {{base}} {{lora}} {{strength}} {{input}} {{out}}"
    cells, skipped = cells_of(resolve(spec))
    assert ([cell.place for cell in cells], skipped) == (["format peft, bench tiny-llama"], [])
    seen = observed(resolve(spec))
    assert judge_outputs(seen) == []
    assert seen.fits[LAYERS[0]][0].scale == pytest.approx(0.75, rel=1e-4)


def raw(base, lora, *, strength, inputs):
    return law_of(lambda a, r, s: s * a)(base, lora, strength=strength, inputs=inputs)


@loader(outputs=True)
def skips_down_projections(base, lora, *, strength, inputs):
    known = "down_proj" not in next(iter(read_lora(lora).modules))
    return law_of(lambda a, r, s: s * a / r if known else 0.0)(base, lora, strength=strength, inputs=inputs)


@pytest.mark.slow
def test_modules_that_are_left_out_are_told_from_a_lora_without_effect():
    (found,) = [v for v in check_loader(skips_down_projections, max_examples=1, limits=Limits(workers=0)) if not v.ok]
    assert (found.code, "2 of 14 modules" in found.title) == ("LH102", True)


def test_what_outputs_do_not_show_is_not_judged():
    verdicts = check_loader(loader(outputs=True)(raw), max_examples=1, limits=Limits(workers=0))
    assert {v.code for v in verdicts if v.outcome == "failed"} == {"LH201"}
    (failed,) = [v for v in verdicts if v.outcome == "failed"]
    assert failed.reproduce is not None
    unseen = {v.check: v.reason for v in verdicts if v.outcome == "skipped"}
    assert set(unseen) == {"side_effects", "numerics"}
    assert all(reason is not None and reason.startswith("not judged: ") for reason in unseen.values())


SERVER = """
import json, sys
print(json.dumps({"protocol": 1, "outputs": True, "name": "acme"}), flush=True)
import torch
from safetensors.torch import save_file
for line in sys.stdin:
    ask = json.loads(line)
    assert ask["op"] == "outputs", ask
    save_file({"logits": torch.full((1, 6, 40), ask["strength"])}, ask["out"])
    print(json.dumps({"id": ask["id"], "done": True}), flush=True)
"""


def test_a_server_may_give_outputs_too(tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    subject = resolve(f"serve:'{sys.executable}' '{tmp_path / 'server.py'}'")
    assert (subject.title, subject.benches, subject.outputs is not None) == ("acme", ("tiny-llama",), True)
    assert subject.outputs is not None
    answer = subject.outputs(tmp_path, tmp_path, strength=0.5, inputs={"input_ids": torch.ones(1, 6)})
    assert torch.equal(answer, torch.full((1, 6, 40), 0.5))
    subject.close()


@pytest.mark.parametrize(
    ("line", "says"),
    {
        "outputs:tool {base} {lora} {strength} {out}": r"lacks \{input\}; write outputs:tool --base",
        "outputs:no-such {base} {lora} {strength} {input} {out}": "no program 'no-such'",
    }.items(),
)
def test_a_line_that_cannot_be_run_is_a_bad_spec(line, says):
    with pytest.raises(LoaderSpecError, match=says):
        resolve(line)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [({}, "has 0 tensors"), ({"a": torch.ones(1), "b": torch.ones(1)}, "has 2 tensors"), (None, "wrote no file")],
)
def test_a_file_that_is_no_output_is_said(tensors, says, tmp_path):
    from harness.loaders.exchange import OutputError
    from harness.loaders.outputs import read_output

    if tensors is not None:
        save_file(tensors, tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match=says):
        read_output(tmp_path / "out.safetensors")
