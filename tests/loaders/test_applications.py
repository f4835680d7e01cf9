"""Loaders of other applications: each is measured where it is here, as a package, a release or a checkout."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from harness.checks.cell import Cell
from harness.checks.families.silence import check_silence
from harness.checks.family import judge
from harness.checks.outputs import judge_outputs, observe_outputs
from harness.checks.plan import smoke_example
from harness.checks.trial import run_trial
from harness.errors import LoaderSpecError
from harness.example import Example, Target
from harness.isolation.calls import listened
from harness.loaders.protocol import Subject
from harness.loaders.registry import resolve

RELEASES = {"adapters": "1.3.0", "adapters-runtime": "1.3.0", "litgpt": "0.5.13"}
Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
PLACES = [
    ("adapters", "peft", "tiny-llama", "lora", [f"model.layers.1.{DOWN}", f"model.layers.0.{Q}"]),
    ("adapters-runtime", "peft", "clip-text", "lora", ["text_model.encoder.layers.0.mlp.fc1"]),
    ("litgpt", "peft", "tiny-llama", "lora", [f"model.layers.0.{Q}", "model.layers.1.self_attn.v_proj"]),
    ("litgpt", "peft", "tiny-llama", "lora", [f"model.layers.1.{DOWN}", "model.layers.0.self_attn.o_proj"]),
    ("musubi-tuner", "kohya", "qwen-image", "lora", ["transformer_blocks.0.attn.to_q", "img_in"]),
    ("musubi-tuner", "kohya", "qwen-image", "loha", ["transformer_blocks.0.attn.to_q"]),
    ("musubi-tuner-network", "kohya", "qwen-image", "lora", ["transformer_blocks.0.attn.to_q"]),
    ("lightx2v", "comfyui", "qwen-image", "lora", ["transformer_blocks.0.attn.to_q"]),
    ("lightx2v", "diffsynth", "wan21-t2v", "qkv-merged", ["blocks.0.self_attn.q", "blocks.1.ffn.2"]),
]


def subject_of(name: str) -> Subject:
    try:
        return resolve(name)
    except LoaderSpecError as absent:
        try:
            return resolve(f"{name}=={RELEASES[name]}")
        except (KeyError, LoaderSpecError):
            pytest.skip(str(absent))


@pytest.mark.parametrize(("name", "form", "bench", "variant", "layers"), PLACES)
def test_it_gives_strength_times_alpha_over_rank(
    name: str, form: str, bench: str, variant: str, layers: list[str]
) -> None:
    subject = subject_of(name)
    cell = Cell(subject, form, bench, variant)
    assert subject.unsupported(form, bench, variant) is None
    strength = 1.0 if subject.strength_argument is None else -0.75
    seen = run_trial(cell, Example(tuple(Target(layer, 4, 6.0) for layer in layers), strength))
    assert seen.raised is None
    assert {layer: fits[0].scale for layer, fits in seen.fits.items()} == pytest.approx(
        dict.fromkeys(layers, strength * 1.5), rel=1e-5
    )
    assert judge(seen) == []


def test_mlx_multiplies_by_the_scale_of_the_file() -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    cell, layer = Cell(resolve("mlx-lm"), "mlx", "tiny-llama"), f"model.layers.1.{DOWN}"
    seen = observe_outputs(cell, Example((Target(layer, 4, 6.0),), 1.0))
    (fit,) = seen.fits[layer]
    assert fit.scale == pytest.approx(1.5, rel=1e-4)
    assert judge_outputs(seen) == []


def test_the_network_of_musubi_needs_an_alpha_and_its_merge_while_reading_does_not() -> None:
    example = Example((Target("transformer_blocks.0.attn.to_q", 4, None),), 1.0)
    raised = {
        name: run_trial(Cell(subject_of(name), "kohya", "qwen-image"), example).raised
        for name in ("musubi-tuner", "musubi-tuner-network")
    }
    assert raised["musubi-tuner"] is None
    assert "KeyError: 'lora_unet_transformer_blocks_0_attn_to_q'" in str(raised["musubi-tuner-network"])


def test_lightx2v_takes_alpha_0_for_none_and_says_what_it_leaves_out() -> None:
    cell = Cell(subject_of("lightx2v"), "comfyui", "qwen-image")
    seen = run_trial(cell, Example((Target("transformer_blocks.0.attn.to_q", 4, 0.0),), 1.0))
    assert seen.zero_alpha == {"as the rank"}
    assert list(check_silence(cell, run_trial(cell, smoke_example(cell, cell.targets[:4])), ())) == []


def test_litgpt_gives_the_whole_model_the_dtype_of_the_lora() -> None:
    layer = f"model.layers.0.{Q}"
    cell = Cell(subject_of("litgpt"), "peft", "tiny-llama")
    codes = {
        dtype: {finding.code for finding in judge(run_trial(cell, _of(layer, dtype)))}
        for dtype in ("float32", "bfloat16")
    }
    assert codes == {"float32": set(), "bfloat16": {"LH401", "LH501"}}


def test_adapters_cannot_run_a_model_of_half_precision() -> None:
    layer = f"model.layers.0.{Q}"
    for name in ("adapters", "adapters-runtime"):
        cell = Cell(subject_of(name), "peft", "tiny-llama")
        seen = run_trial(cell, Example((Target(layer, 4, 6.0),), 1.0, dtype="bfloat16", file_dtype="float32"))
        assert "dtype" in str(seen.raised)


def _of(layer: str, dtype: str) -> Example:
    return Example((Target(layer, 4, 6.0),), 1.0, dtype="float32", file_dtype=dtype)


def test_what_goes_through_loguru_is_heard_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks: dict[int, Any] = {}

    def add(sink: Any, **_: object) -> int:
        sinks[1] = sink
        return 1

    monkeypatch.setitem(sys.modules, "loguru", SimpleNamespace(logger=SimpleNamespace(add=add, remove=sinks.pop)))
    lines: list[str] = []
    with listened(lines):
        for number, text in ((10, "looked for q"), (30, "2 keys were not used")):
            sinks[1](SimpleNamespace(record={"level": SimpleNamespace(no=number), "message": text}))
    assert lines == ["looked for q", "warning: 2 keys were not used"]
    assert sinks == {}
