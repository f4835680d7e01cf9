"""One answer for one file and tool: what it says, where it says nothing, and what the command does with it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.doctor.answer import Question
from harness.doctor.answers import answer, answers, prescriptions, why_not
from harness.doctor.causes import causes
from harness.doctor.diagnose import FileDiagnosis, diagnose, tool_named
from harness.doctor.inspect.describe import inspect_file
from harness.doctor.told import lines
from harness.doctor.traits import Traits, untargeted
from harness.errors import UserError
from harness.files import LoraParts, LoraWeights, read_lora, write_lora
from harness.law.findings import findings
from harness.law.known import tools

Numbers = Sequence[tuple[int, float | None]]
QWEN = [f"transformer_blocks.{i}.attn.{n}" for i in range(3) for n in ("to_q", "to_k", "to_v", "to_out.0")]
FULL = [*QWEN, "transformer_blocks.0.img_mlp.net.2"]
WAN = [f"blocks.{i}.{part}" for i in range(40) for part in ("self_attn.q", "self_attn.k", "cross_attn.o", "ffn.0")]
UNET = [
    f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.{n}" for i in range(2) for n in ("to_q", "to_k", "to_v")
]
FLUX = [f"double_blocks.{i}.{n}" for i in range(19) for n in ("img_attn.qkv", "img_attn.proj")]


def write(
    path: Path,
    names: Sequence[str],
    form: str,
    numbers: Numbers = ((4, 2.0),),
    *,
    metadata: Mapping[str, str] | None = None,
    pair: str = "lora_A",
    prefix: str = "",
    flat: bool = False,
) -> Path:
    """Write a file in the spelling `prefix` + name + `pair`; `form` is checked against what it is read as."""
    halves = {
        "lora_A": ("lora_A", "lora_B"),
        "default": ("lora_A.default", "lora_B.default"),
        "down": ("lora_down", "lora_up"),
    }
    tensors = {}
    for index, name in enumerate(names):
        rank, alpha = numbers[index % len(numbers)]
        stem = prefix + (name.replace(".", "_") if flat else name)
        for half, shape in zip(halves[pair], ((rank, 8), (8, rank)), strict=True):
            tensors[f"{stem}.{half}.weight"] = torch.randn(shape)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    path = path / "lora.safetensors"
    save_file(tensors, path, metadata=dict(metadata or {}) or None)
    assert read_lora(path).format == form
    return path


def kohya(path: Path, names: Sequence[str], numbers: Numbers = ((4, 2.0),)) -> Path:
    return write(path, names, "kohya", numbers, pair="down", prefix="lora_unet_", flat=True)


def strengths(path: Path, **asked: float) -> dict[str, float | None]:
    found = answers(Traits(read_lora(path, strict=False)), Question(**asked))  # type: ignore[arg-type]
    return {name: each.strength for name, each in found.items()}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["diagnose", *map(str, args)])


def said(found: FileDiagnosis) -> str:
    return "\n".join(f"{label}: {text}" for label, text in lines(found))


def test_a_right_file_gets_one_in_standard_readers_and_the_ratio_in_one_that_ignores_alpha(tmp_path: Path) -> None:
    found = strengths(write(tmp_path, QWEN, "diffsynth", pair="default"))
    assert found["diffusers"] == found["comfyui"] == found["diffsynth"] == 1.0
    assert found["diffsynth-2.0.4"] == 0.5


def test_the_founding_file_is_answered_by_its_trainers_rule(tmp_path: Path) -> None:
    path = write(tmp_path, QWEN, "diffsynth", ((32, None),), pair="default")
    text = said(diagnose(path, tool="diffsynth-2.0.4"))
    assert "alpha = 1  (1 as trained; 4 too strong: artifacts expected; 32 noise expected)" in text
    assert "DiffSynth's trainer takes lora_alpha = rank" in text
    assert "if yours was N, pass N / 32" in text
    assert (
        said(diagnose(path, tool="diffsynth-2.0.4", asked=Question(lora_alpha=16.0))).count(
            "alpha = 0.5  (0.5 as trained"
        )
        == 1
    )
    assert set(inspect_file(path).prescription.values()) == {None}  # the file itself does not say


def test_a_file_without_alpha_or_rule_is_told_what_each_alpha_would_mean(tmp_path: Path) -> None:
    path = write(tmp_path, QWEN, "comfyui", ((32, None),), prefix="diffusion_model.")
    found = diagnose(path, tool="comfyui")
    assert found.answers["comfyui"].strength is None
    assert "if lora_alpha was 32 pass 1, if it was N pass N / 32; passing 32 would be 32x too strong" in said(found)
    assert "--lora-alpha N" in said(found)


@pytest.mark.parametrize(
    ("metadata", "strength"), [({"software": '{"name": "ai-toolkit"}'}, 1.0), ({"ss_network_dim": "16"}, None)]
)
def test_the_trainer_in_the_metadata_decides(tmp_path: Path, metadata: dict[str, str], strength: float | None) -> None:
    path = write(tmp_path, WAN, "comfyui", ((16, None),), prefix="diffusion_model.", metadata=metadata)
    assert diagnose(path, tool="comfyui").answers["comfyui"].strength == strength


def test_per_module_alphas_of_a_unet_get_no_number_in_diffusers_but_a_repair(tmp_path: Path) -> None:
    path = kohya(tmp_path, UNET, ((4, 1.0), (4, 4.0), (4, 4.0)))
    traits = Traits(read_lora(path))
    found = answer(tools()["diffusers"], traits)
    assert (found.strength, found.effect, found.sure) == (None, "factor", "measured")
    assert found.instead == "kohya"
    assert "docs/findings/diffusers-unet-mixed-alphas-ignored.md" in why_not(found, traits, Question())
    assert answer(tools()["comfyui"], traits).strength == 1.0
    assert answer(tools()["diffusers"], Traits(read_lora(kohya(tmp_path, UNET)))).strength == 1.0


def test_what_repair_writes_is_read_as_it_was_promised(tmp_path: Path) -> None:
    from harness.doctor.repair.repair import repair_file

    path = kohya(tmp_path, UNET, ((4, 1.0), (4, 4.0), (4, 4.0)))
    new = repair_file(path, "kohya", tmp_path / "new.safetensors").path
    assert answer(tools()["diffusers"], Traits(read_lora(new))).strength == 1.0


FILES_OF_FINDINGS = {
    "diffusers-negative-alpha-hang": ("diffusers", lambda p: kohya(p, QWEN, ((4, -4.0),))),
    "diffusers-unet-mixed-alphas-ignored": ("diffusers", lambda p: kohya(p, UNET, ((4, 1.0), (4, 4.0)))),
    "diffusers-missing-alpha-takes-the-most-common": ("diffusers", lambda p: kohya(p, UNET, ((4, 1.0), (4, None)))),
    "diffusers-qwen-transformer-prefix-doubled": (
        "diffusers",
        lambda p: write(p, FULL, "diffusers", prefix="transformer."),
    ),
    "diffusers-qwen-double-underscore": (
        "diffusers",
        lambda p: write(p, FULL, "kohya", pair="down", prefix="lora_unet__", flat=True),
    ),
    "diffusers-flux-kohya-outer-modules-dropped": (
        "diffusers",
        lambda p: kohya(p, [*FLUX, "img_in", "vector_in.in_layer"]),
    ),
    "diffusers-flux-kohya-final-layer-alpha-ignored": (
        "diffusers",
        lambda p: kohya(p, [*FLUX, "vector_in.in_layer", "final_layer.linear"]),
    ),
    "diffsynth-dora-and-unknown-keys-silent": (
        "diffsynth",
        lambda p: write_lora(p / "d", "diffsynth", {"a.b": dora()}),
    ),
    "comfyui-dora-output-axis-norm": (
        "comfyui",
        lambda p: write_lora(p / "d", "comfyui", {"blocks.0.self_attn.q": dora()}),
    ),
    "comfyui-header-alpha-ignored": (
        "comfyui",
        lambda p: write_lora(p / "d", "diffusers", {n: weights(4, (1.0, 4.0)[i % 2]) for i, n in enumerate(QWEN)}),
    ),
    "comfyui-unet-attention-names": (
        "comfyui",
        lambda p: write_lora(p / "d", "diffusers", {n: weights(4, 4.0) for n in UNET}, prefix="unet."),
    ),
    "invokeai-qwen-alpha-beside-lora-a-dropped": (
        "invokeai",
        lambda p: write(p, FULL, "diffsynth", ((4, 1.0), (4, 4.0)), pair="default"),
    ),
    "lycoris-missing-alpha": ("lycoris", lambda p: kohya(p, UNET, ((4, None),))),
    "lycoris-loha-lokr-merge-squares-alpha": ("lycoris", lambda p: write_lora(p / "d", "kohya", {"a.b": loha()})),
    "lycoris-dora-bfloat16": ("lycoris", lambda p: write_lora(p / "d", "kohya", {"a.b": dora()})),
    "diffsynth-sdxl-alpha-ignored": (
        "diffsynth",
        lambda p: kohya(p, ["input_blocks.4.1.proj_in", "input_blocks.4.1.proj_out"]),
    ),
    "diffusers-text-encoder-mlp-alone": (
        "diffusers",
        lambda p: write(p, ["text_model.encoder.layers.0.mlp.fc1"], "diffusers", ((4, None),), prefix="text_encoder."),
    ),
    "diffusers-text-encoder-without-out-proj": (
        "diffusers",
        lambda p: write(
            p, ["text_model.encoder.layers.0.self_attn.q_proj"], "kohya", pair="down", prefix="lora_te_", flat=True
        ),
    ),
    "diffusers-text-encoder-mixed-alphas-ignored": (
        "diffusers",
        lambda p: write(
            p,
            [f"text_model.encoder.layers.0.self_attn.{n}_proj" for n in ("q", "out")],
            "kohya",
            ((4, 1.0), (4, 4.0)),
            pair="down",
            prefix="lora_te_",
            flat=True,
        ),
    ),
}


def weights(rank: int, alpha: float | None) -> LoraWeights:
    return LoraWeights(torch.randn(rank, 8), torch.randn(8, rank), alpha)


def dora() -> LoraParts:
    parts = {"A": torch.randn(4, 8), "B": torch.randn(6, 4), "magnitude": torch.rand(6, 1) + 0.5}
    return LoraParts(parts, 2.0)


def loha() -> LoraParts:
    parts = {f"hada_w{i}_{half}": torch.randn(*((6, 4) if half == "a" else (4, 8))) for i in "12" for half in "ab"}
    return LoraParts(parts, 2.0)


@pytest.mark.parametrize("page", FILES_OF_FINDINGS)
def test_a_file_that_meets_a_finding_gets_no_naive_number(page: str, tmp_path: Path) -> None:
    tool, make = FILES_OF_FINDINGS[page]
    record = inspect_file(make(tmp_path))
    assert page in record.findings
    assert tool in findings()[page].tools
    assert record.prescription[tool] is None
    assert record.unprescribed[tool]


def test_a_file_whose_alpha_a_tool_ignores_gets_the_ratio_where_there_is_one(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "diffusers", {name: weights(4, 1.0) for name in QWEN})
    found = answer(tools()["comfyui"], Traits(read_lora(path)))
    assert found.strength == 0.25
    assert "comfyui-header-alpha-ignored" in [finding.page for finding in found.findings]


def test_a_release_that_was_not_measured_is_not_judged(tmp_path: Path) -> None:
    traits = Traits(read_lora(write(tmp_path, QWEN, "diffsynth", pair="default")))
    for tool, version in (("diffusers", "0.35.2"), ("diffusers", "main"), ("a1111", "1.10.1")):
        found = answer(tools()[tool], traits, Question(version=version))
        assert (found.strength, found.effect) in ((None, "unknown"), (None, "cannot")), tool
    assert answer(tools()["diffsynth"], traits, Question(version="2.0.9")).strength == 1.0
    assert answer(tools()["diffsynth"], traits, Question(version="2.0.4")).strength == 0.5
    assert answer(tools()["diffsynth-2.0.4"], traits, Question(version="1.1.9")).strength == 0.5


def test_a_release_measured_on_plain_lora_is_not_judged_on_a_rank_stabilised_one(tmp_path: Path) -> None:
    """PEFT's `set_scale` forgot use_rslora up to 0.17.1 (huggingface/peft#2733)."""
    traits = Traits(read_lora(write_lora(tmp_path / "x", "peft", {"a.to_q": weights(4, 8.0)}, rslora=True)))
    found = answer(tools()["peft"], traits, Question(version="0.17.1"))
    assert (found.effect, found.strength) == ("unknown", None)
    assert "rslora" in found.says
    assert answer(tools()["peft"], traits).strength == 1.0


def test_layers_that_no_measured_architecture_has_are_unknown(tmp_path: Path) -> None:
    path = write(tmp_path, ["blocks.0.no_such_layer"], "diffusers", ((4, None),), prefix="transformer.")
    found = answer(tools()["diffusers"], Traits(read_lora(path)), Question(lora_alpha=4.0))
    assert (found.effect, found.strength, found.sure) == ("unknown", None, "unknown")


def test_a_broken_file_gets_no_number_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {
            "a.lora_A.weight": torch.randn(4, 8),
            "b.lora_A.weight": torch.randn(4, 8),
            "b.lora_B.weight": torch.randn(8, 4),
        },
        path,
    )
    assert set(prescriptions(read_lora(path, strict=False), lora_alpha=4.0).values()) == {None}
    assert run(path).exit_code == 1


def test_noise_is_traced_to_what_the_file_speaks_for_first(tmp_path: Path) -> None:
    found = diagnose(write(tmp_path, QWEN, "diffsynth", pair="default"), tool="diffsynth-2.0.4", saw="noise")
    first, *others = causes(found)
    assert first.what == "wrong strength"
    assert "2 times as strong" in first.evidence
    assert "0.5" in first.test
    assert "modules dropped or misplaced" in {cause.what for cause in others}
    assert all(cause.test for cause in causes(found))


def test_nothing_seen_is_traced_to_dropped_modules(tmp_path: Path) -> None:
    path = write(tmp_path, FULL, "diffsynth", ((4, None),))
    first, *_ = causes(diagnose(path, tool="diffusers", saw="nothing"))
    assert first.what == "modules dropped or misplaced"
    assert "loads none of its modules" in first.evidence


def test_a_weak_effect_names_the_layers_left_alone(tmp_path: Path) -> None:
    found = diagnose(write(tmp_path, FULL, "diffsynth", pair="default"), saw="weak")
    assert any("mod" in kind or "mlp" in kind for kind in untargeted(found.traits))
    assert len(causes(found)) >= 4


def test_weights_that_were_looked_at_are_no_cause_to_look_for(tmp_path: Path) -> None:
    path, nan = write(tmp_path, QWEN, "diffsynth", pair="default"), "NaN or infinite weights"
    told = [[cause.what for cause in causes(diagnose(path, saw="noise", headers_only=only))] for only in (False, True)]
    assert [nan in each for each in told] == [False, True]


@pytest.mark.parametrize("saw", ["noise", "nothing", "weak", "strong"])
def test_every_symptom_has_causes(saw: str, tmp_path: Path) -> None:
    done = run(write(tmp_path, QWEN, "diffsynth", pair="default"), "--saw", saw)
    assert done.exit_code == 0
    assert "cause 1" in done.output


def test_the_command_says_it_in_about_six_lines_and_in_json(tmp_path: Path) -> None:
    path = kohya(tmp_path, UNET, ((4, 1.0), (4, 4.0)))
    done = run(path, "--tool", "comfyui")
    assert done.exit_code == 0
    assert "strength_model = 1" in done.output
    assert len(list(lines(diagnose(path, tool="comfyui")))) <= 7
    facts = json.loads(run(path, "--json").output)
    by_tool = {each["tool"]: each for each in facts["answers"]}
    assert by_tool["diffusers"]["strength"] is None
    assert by_tool["diffusers"]["findings"] == ["diffusers-unet-mixed-alphas-ignored"]
    assert by_tool["a1111"]["field"] == "<lora:name:weight>"
    assert run(path, "--tool", "diffusers").exit_code == 1


def test_what_cannot_be_answered_is_one_sentence(tmp_path: Path) -> None:
    path = kohya(tmp_path, UNET)
    assert (run(path, "--tool", "no such tool").exit_code, run(path, "--tool", "d").exit_code) == (2, 2)
    assert run(path, "--tool-version", "1").exit_code == 2
    assert run(tmp_path / "missing.safetensors").exit_code == 2


def test_a_tool_is_found_by_its_name_or_its_title() -> None:
    assert tool_named("ComfyUI").name == "comfyui"
    assert tool_named("stable-diffusion-webui-forge").name == "forge"
    with pytest.raises(UserError, match="several tools"):
        tool_named("diff")


def test_an_audit_counts_the_files_by_finding(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        kohya(tmp_path / name, UNET, ((4, 1.0), (4, 4.0)))
    done = CliRunner().invoke(main, ["audit", str(tmp_path)])
    assert "2  files hit diffusers-unet-mixed-alphas-ignored" in done.output


def test_names_out_of_a_file_are_safe_to_show(tmp_path: Path) -> None:
    path = write(tmp_path, ["a\x1b[2J.b"], "diffusers", prefix="transformer.")
    assert "\x1b" not in run(path).output
    assert "\x1b" not in run(path, "--saw", "noise", "--tool", "diffusers").output


def test_a_large_file_is_answered_from_its_header_alone(tmp_path: Path) -> None:
    path = kohya(tmp_path, [f"blocks.{i}.{n}" for i in range(200) for n in ("self_attn.q", "ffn.0")])
    began = time.process_time()
    diagnose(path)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    ("value", "saw", "code", "cause"),
    [(float("nan"), "noise", "LH707", "NaN"), (0.0, "nothing", "LH713", "untrained B")],
)
def test_what_the_weights_show_is_said_first(value: float, saw: str, code: str, cause: str, tmp_path: Path) -> None:
    path = write_lora(
        tmp_path / "x", "diffsynth", {QWEN[0]: LoraWeights(torch.randn(4, 8), torch.full((8, 4), value), 4)}
    )
    assert run(path).exit_code == 1
    found = diagnose(path, saw=saw)  # type: ignore[arg-type]
    assert ("broken", code) in [(label, text[:5]) for label, text in lines(found)]
    assert causes(found)[0].what.startswith(("NaN", "an untrained"))
    assert cause in causes(found)[0].what


def test_the_release_decides_which_row_of_a_tool_answers(tmp_path: Path) -> None:
    path = write(tmp_path, QWEN, "diffsynth", [(4, 2.0)])
    old = run(path, "--tool", "diffsynth", "--tool-version", "2.0.4")
    assert "DiffSynth-Studio 2.0.4: applies every module 2 times" in old.output
    assert "alpha = 0.5" in old.output
    assert "alpha = 1 " in run(path, "--tool", "diffsynth", "--tool-version", "2.1.12").output


@pytest.mark.parametrize(("beside", "strength"), [("diff_b", 1.0), ("diff", None), ("set_weight", None)])
def test_a_whole_tensor_beside_a_pair_is_what_comfyui_makes_of_it(
    beside: str, strength: float | None, tmp_path: Path
) -> None:
    path = write(tmp_path, WAN, "comfyui", ((4, 4.0),), prefix="diffusion_model.", pair="down")
    tensors = load_file(path) | {f"diffusion_model.{WAN[0]}.{beside}": torch.ones(8, *[8] * (beside != "diff_b"))}
    save_file(tensors, path)
    found = answer(tools()["comfyui"], Traits(read_lora(path)))
    assert found.strength == strength
    assert found.effect == ("law" if strength else "drops")


@pytest.mark.parametrize(
    ("kind", "tool", "strength"),
    [
        ("in", "comfyui", 1.0),
        ("out", "comfyui", None),
        ("vector", "comfyui", None),
        ("vector", "diffusers", None),
        ("out", "diffusers", None),
    ],
)
def test_magnitudes_count_as_each_tool_was_measured_to_take_them(
    kind: str, tool: str, strength: float | None, tmp_path: Path
) -> None:
    path = kohya(tmp_path, UNET, ((4, 4.0),))
    tensors, tail = load_file(path), "lora_magnitude_vector" if kind == "vector" else "dora_scale"
    shape = {"out": (8, 1), "in": (1, 8), "vector": (8,)}[kind]
    tensors |= {key.replace(".alpha", f".{tail}"): torch.ones(shape) for key in list(tensors) if key.endswith("alpha")}
    save_file(tensors, path)
    found = answer(tools()[tool], Traits(read_lora(path)))
    assert found.strength == strength
    if strength is None:
        assert found.effect != "law"


@pytest.mark.parametrize(("ffn", "strength"), [((0, 2), 1.0), ((0,), None)])
def test_blocks_are_whole_where_all_layers_of_a_sequence_are_there(
    ffn: Sequence[int], strength: float | None, tmp_path: Path
) -> None:
    attention = [f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"]
    names = [f"blocks.{i}.{part}" for i in range(40) for part in (*attention, *(f"ffn.{n}" for n in ffn))]
    traits = Traits(read_lora(kohya(tmp_path, names)))
    assert answer(tools()["diffusers"], traits).strength == strength


def test_the_authors_names_are_no_work_of_diffusers_scripts(tmp_path: Path) -> None:
    flux = [f"double_blocks.{i}.img_attn.{part}" for i in range(19) for part in ("qkv", "proj")]
    assert diagnose(write(tmp_path, flux, "diffusers", ((8, None),), prefix="transformer.")).rule is None
    own = [f"transformer_blocks.{i}.attn.to_q" for i in range(19)]
    assert diagnose(write(tmp_path, own, "diffusers", ((8, None),), prefix="transformer.")).rule


def test_musubis_networks_are_musubis(tmp_path: Path) -> None:
    path = kohya(tmp_path, WAN)
    save_file(load_file(path), path, metadata={"ss_network_module": "networks.lora_wan", "ss_network_dim": "4"})
    assert diagnose(path).trainer == "musubi-tuner"
