from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.images import lora_file, open_pipeline, run_sweep
from harness.images.sampling import Pair, Sampler
from harness.images.studio import Studio
from harness.loaders.declaration import Declaration
from harness.loaders.protocol import Subject
from harness.loaders.registry import resolve

from .subjects import raw_alpha, subject, times

pytestmark = pytest.mark.images
FEW = (0.0, 0.5, 1.0, 2.0)


def sweep(loader: Subject, tiny, lora, **more):
    return run_sweep(loader, **({"pipeline": tiny, "lora": lora, "alphas": FEW, "progress": False} | more))


def test_peft_passes_at_every_strength(tiny, r8_a16):
    found = sweep(resolve("peft"), tiny, r8_a16, alphas=(-1, 0, 0.25, 0.5, 1, 2, 4, 32))
    assert [v.outcome for v in found.verdicts] == ["passed"], found.verdicts[0].text()
    assert found.verdicts[0].estimated_factor == pytest.approx(1, abs=0.01)
    assert all(row["metrics"]["ssim_reference"] > 0.999 for row in found.records)


@pytest.mark.parametrize("name", ["diffusers", "diffusers-fused"])
def test_diffusers_passes(name: str):
    found = run_sweep(resolve(name), alphas=FEW, progress=False)
    assert found.verdicts[0].outcome == "passed", found.verdicts[0].text()


def test_raw_alpha_is_flagged_with_its_factor(tiny, r8_a16):
    found = sweep(raw_alpha(), tiny, r8_a16, alphas=(0, 0.25, 1, 4)).verdicts[0]
    assert found.outcome == "failed"
    assert found.code in ("LH601", "LH602")
    assert found.estimated_factor == pytest.approx(8, rel=0.1)
    assert found.prescription == pytest.approx(1 / 8, rel=0.1)
    assert found.interval[0] < 8 < found.interval[1]
    assert ("use", f"strength = {found.prescription:g} until it is fixed") in found.rows
    assert "r8_a16, rank 8, alpha 16.0" in found.text()


def test_the_example_of_the_readme_is_flagged():
    example = Path(__file__).parents[2] / "examples" / "raw_alpha.py"
    found = run_sweep(resolve(f"{example}:load"), alphas=(1,), progress=False).verdicts[0]
    assert found.outcome == "failed"
    assert found.estimated_factor == pytest.approx(8, rel=0.1)


def test_far_off_the_factor_comes_from_one_more_strength(tiny):
    found = sweep(raw_alpha(), tiny, lora_file("r32_a32", "kohya"), alphas=(0, 1))
    assert found.verdicts[0].code == "LH601"
    assert found.verdicts[0].estimated_factor == pytest.approx(32, rel=0.1)
    assert found.records[-1]["strength"] == pytest.approx(1 / 32, rel=0.5)


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.25, 2.0])
def test_eight_pictures_flag_a_loader_a_quarter_off_or_more(tiny, r8_a16, factor: float):
    found = sweep(times(factor), tiny, r8_a16, alphas=(1,)).verdicts[0]
    assert found.examples == 8
    assert found.code == "LH602"
    assert found.estimated_factor == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_quick_probe_flags_ten_percent(tiny, r8_a16, factor: float):
    found = sweep(times(factor), tiny, r8_a16, alphas=(1,), quick=True).verdicts[0]
    assert found.code == "LH602"
    assert found.estimated_factor == pytest.approx(factor, rel=0.03)


def test_the_quick_probe_passes_peft(tiny, r8_a16):
    assert sweep(resolve("peft"), tiny, r8_a16, quick=True).verdicts[0].outcome == "passed"


def test_alpha_over_rank_on_an_rslora_file_is_a_quarter_of_the_strength(tiny):
    lora = lora_file("r16_a4_rslora", "peft")
    classic = subject("classic", lambda rank, scale, strength: scale / rank**0.5 * strength)
    opened = open_pipeline(tiny.folder)  # trained on the stock layers, which the shared pipeline may have merged
    found = run_sweep(classic, pipeline=opened, lora=lora, alphas=FEW, progress=False).verdicts[0]
    assert found.estimated_factor == pytest.approx(0.25, rel=0.1)
    assert found.code == "LH602"


def test_a_loader_that_does_nothing_has_no_visible_effect(tiny, r8_a16):
    assert (
        sweep(Subject("nothing", lambda model, lora, *, strength=1.0: None), tiny, r8_a16).verdicts[0].code == "LH603"
    )


def test_a_dropped_part_matches_no_strength(tiny, r8_a16):
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        before = {n: p.clone() for n, p in model.named_parameters() if "qkv" in n or "mlp" in n}
        times(1).load(model, lora, strength=strength)
        model.load_state_dict(before, strict=False)

    found = sweep(Subject("modulation-only", load), tiny, r8_a16, alphas=(1,)).verdicts[0]
    assert found.outcome == "failed"


def test_strength_squared_is_right_at_one_and_flagged_elsewhere(tiny, r8_a16):
    squared = subject("squared", lambda rank, scale, strength: scale * strength * abs(strength))
    found = sweep(squared, tiny, r8_a16).verdicts[0]
    assert found.code == "LH602"
    assert "mishandled" in found.title
    assert found.prescription is None


def test_nan_weights_are_broken_pictures(tiny, r8_a16):
    broken = subject("nan", lambda rank, scale, strength: float("nan") if strength else 0.0)
    found = sweep(broken, tiny, r8_a16)
    assert found.verdicts[0].code == "LH502"
    assert found.records[-1]["label"] == "broken"


def test_a_subtle_lora_is_inconclusive_and_not_a_pass(tiny):
    found = sweep(raw_alpha(), tiny, lora_file("subtle_r4_a8", "peft"), alphas=(0, 0.5, 1)).verdicts[0]
    assert found.outcome == "skipped"
    assert "inconclusive" in found.title


def test_a_crash_is_an_errored_verdict_and_keeps_what_was_drawn(tiny, r8_a16):
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        if strength > 1:
            raise KeyError("to_qkv")

    found = sweep(Subject("crashes", load), tiny, r8_a16)
    assert (found.verdicts[0].outcome, found.verdicts[0].code) == ("errored", "LH901")
    assert [row["strength"] for row in found.records] == [0.0, 0.5, 1.0]


def test_a_process_that_dies_is_an_errored_verdict_and_keeps_what_was_drawn(tiny, r8_a16, tmp_path: Path):
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        if strength > 1:
            print("good bye", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    seen: list[dict] = []
    found = sweep(Subject("dies", load), tiny, r8_a16, out=tmp_path, on_record=seen.append)
    assert [(v.outcome, v.code) for v in found.verdicts] == [("errored", "LH901")]
    assert found.verdicts[0].title == "loader raised: process died: killed by SIGKILL (dies at 2)"
    assert ("printed", "good bye") in found.verdicts[0].rows
    assert [row["strength"] for row in found.records] == [row["strength"] for row in seen] == [0.0, 0.5, 1.0]
    assert all((tmp_path / image["path"]).is_file() for row in seen for image in row["images"])


@pytest.mark.parametrize("quick", [True, False])
def test_a_pipeline_that_fails_is_no_fault_of_the_loader(tiny, r8_a16, quick: bool):
    broken = replace(tiny, call=tiny.call | {"no_such_argument": 1}, folder=f"{tiny.folder}/broken")
    with pytest.raises(UserError, match="broken: the pipeline fails without any loader: TypeError"):
        sweep(times(1), broken, r8_a16, alphas=(1,), quick=quick)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_load_has_a_time_limit(tiny, r8_a16, workers: int):
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        while strength > 0.5:
            time.sleep(0.01)

    found = sweep(Subject("hangs", load), tiny, r8_a16, time_limit=0.5, workers=workers)
    assert found.verdicts[0].title == "loader raised: no answer within the time limit of 0.5 s (--time-limit)"
    assert [row["strength"] for row in found.records] == [0.0, 0.5]


def test_the_memory_of_a_subject_is_limited(tiny, r8_a16):
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        bytearray(6 << 30)  # never touched, so it costs no memory where there is no limit

    found = sweep(Subject("greedy", load), tiny, r8_a16, quick=True, alphas=(1,)).verdicts[0]
    assert (found.code, found.title) == ("LH901", "loader raised: MemoryError")


def test_the_subject_runs_in_a_child_unless_no_worker_is_wanted(tiny, r8_a16):
    processes: list[int] = []

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        processes.append(os.getpid())

    sweep(Subject("child", load), tiny, r8_a16, quick=True, alphas=(1,))
    assert processes == []
    sweep(Subject("here", load), tiny, r8_a16, quick=True, alphas=(1,), workers=0)
    assert processes == [os.getpid()]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_listener_is_not_the_loaders(tiny, r8_a16, workers: int):
    def on_record(row: dict) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(times(1), tiny, r8_a16, quick=True, alphas=(0, 1), on_record=on_record, workers=workers)


def test_references_drawn_in_a_child_are_there_for_the_next_loader(tiny, r8_a16):
    pairs = [Pair("red circle on dark", 77)]
    sweep(times(1), tiny, r8_a16, alphas=(1,), prompts=["red circle on dark"], seeds=(77,))
    steps: list[str] = []
    assert Studio(tiny, r8_a16, pairs, step=steps.append).reference(1.0).shape[0] == 1
    assert steps == []


def test_rows_are_json_and_their_pictures_exist(tiny, r8_a16, tmp_path: Path):
    seen: list[dict] = []
    found = sweep(times(1), tiny, r8_a16, alphas=(0, 1), out=tmp_path, on_record=seen.append)
    assert seen == found.records == json.loads(json.dumps(found.records))
    for row in found.records:
        assert len([image for image in row["images"] if image["role"] == "candidate"]) == 8
        assert all((tmp_path / image["path"]).is_file() for image in row["images"])


def test_rows_are_sweep_records_of_a_run(tiny, r8_a16, tmp_path: Path):
    from harness.report.models import SweepRecord

    for row in sweep(times(1), tiny, r8_a16, alphas=(0, 1), out=tmp_path).records:
        assert SweepRecord.model_validate(row).strength == row["strength"]


def test_runtime_adapters_are_drawn_in_shared_batches_and_give_the_same_pictures(tiny, r8_a16):
    from peft import PeftModel

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
        adapted = PeftModel.from_pretrained(model, str(lora))
        for module in adapted.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", strength)
        return adapted.base_model.model

    runtime = Subject("runtime", load, "1", Declaration())
    steps: list[str] = []
    pairs = [Pair("red circle on dark", 3), Pair("cyan cross on lake", 4)]
    studio = Studio(tiny, r8_a16, pairs, step=steps.append)
    together = {strength: images for strength, images, _ in studio.candidates(runtime, FEW)}
    assert any("shared batches" in step for step in steps)
    for strength, pictures in together.items():
        torch.testing.assert_close(pictures, studio.reference(strength), atol=2e-3, rtol=0)


def test_a_batch_that_does_not_fit_is_halved_and_one_picture_too_many_is_an_error(tiny, monkeypatch):
    draw = Sampler._draw

    def limited(limit: int):
        def drawn(self, pairs):
            if len(pairs) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return draw(self, pairs)

        return drawn

    pairs = [Pair("red circle on dark", seed) for seed in range(4)]
    monkeypatch.setattr(Sampler, "_draw", limited(1))
    sampler = Sampler(tiny, pairs, batch=4)
    assert len(sampler.images(tiny.fresh())) == 4
    assert sampler.batch == 1
    monkeypatch.setattr(Sampler, "_draw", limited(0))
    with pytest.raises(UserError, match="out of memory with one picture at a time"):
        sampler.images(tiny.fresh())


@pytest.mark.parametrize("sequential", [True, False])
def test_negative_strengths_are_judged_as_positive_ones(tiny, r8_a16, sequential):
    sizeless = subject("sizeless", lambda rank, scale, strength: abs(strength) * scale)
    more = {"alphas": (-3.0, -2.0), "prompts": ["triangle dusk", "dusk green red"], "sequential": sequential}
    outcomes = [
        sweep(loader, tiny, r8_a16, **more).verdicts[0].outcome for loader in (resolve("peft"), times(2), sizeless)
    ]
    assert outcomes == ["passed", "failed", "failed"]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("strength", [1e3, -1e6, 1e30])
def test_where_the_reference_is_noise_nobody_is_judged_but_strength_1_is_tried(tiny, r8_a16, strength, quick):
    for loader, outcome in ((resolve("peft"), "passed"), (times(2), "failed")):
        (verdict,) = sweep(loader, tiny, r8_a16, alphas=(strength,), quick=quick).verdicts
        assert (verdict.outcome, verdict.code) == (outcome, "LH602" if outcome == "failed" else None)


def test_no_prompt_and_no_strength_are_refused(tiny, r8_a16):
    with pytest.raises(UserError, match="no prompt"):
        sweep(times(1), tiny, r8_a16, prompts=[])
    with pytest.raises(UserError, match="alphas is empty"):
        sweep(times(1), tiny, r8_a16, alphas=[])
    with pytest.raises(UserError, match="alphas has nan"):
        sweep(times(1), tiny, r8_a16, alphas=[1, math.nan])
