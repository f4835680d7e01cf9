"""A machine with a GPU, as far as torch tells: children find none, but for a subject that needs one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import check_loader, loader
from harness.checks import cell as cells
from harness.isolation.jobs import Channel, run_jobs
from harness.isolation.subject import Part, subject_process
from harness.verdict.verdict import Verdict

FEW: dict[str, Any] = {"formats": ["diffsynth"], "benches": ["qwen-image-fused"], "max_examples": 2}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def failed(spec: Any, **places: Any) -> list[Verdict]:
    """Return what was wrong; that these leave keys out in silence is known."""
    verdicts = check_loader(spec, **(FEW | places))
    return [verdict for verdict in verdicts if verdict.outcome != "passed" and verdict.code != "LH103"]


def seen() -> list[object]:
    return [torch.cuda.is_available(), torch.cuda.device_count(), os.environ["CUDA_VISIBLE_DEVICES"]]


def asked(channel: Channel, *, gpu: bool) -> None:
    def answer(order: str, on_part: Part) -> list[object]:
        return seen()

    with subject_process(answer, apart=True, gpu=gpu) as subject:
        channel.send([seen(), subject.ask("", 60)])


@pytest.mark.parametrize(("needs", "finds"), [(False, [False, 0, ""]), (True, [True, 2, "0,1"])])
def test_a_judge_finds_no_gpu_and_its_subject_one_where_it_needs_it(needs: bool, finds: list[object]) -> None:
    told: list[object] = []
    run_jobs([lambda channel: asked(channel, gpu=needs)], on_event=lambda index, event: told.append(event))
    assert told == [[[False, 0, ""], finds]]
    assert seen() == [True, 2, "0,1"]


def test_a_loader_that_uses_a_gpu_if_there_is_one_is_checked_on_the_processor() -> None:
    """PEFT puts an adapter onto the first device that it finds."""
    assert not failed("peft", formats=["peft"], benches=["qwen-image"])


def merged(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
    assert seen() == [True, 2, "0,1"], "CUDA is not there"
    from harness.loaders.registry import resolve

    return resolve("diffsynth").load(model, lora, strength=strength)


def test_a_loader_that_needs_a_gpu_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "cuda_devices", lambda: ("pretended",))
    assert not failed(loader(gpu=True)(merged))


def test_one_that_does_not_say_so_is_told_what_to_say() -> None:
    raised = failed(loader()(merged))[0]
    assert raised.code == "LH901"
    assert "@loader(gpu=True)" in raised.text()


def test_one_that_needs_a_gpu_is_not_judged_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "cuda_devices", tuple)
    (skipped,) = failed(loader(gpu=True)(merged))
    assert (skipped.outcome, skipped.title) == ("skipped", "no GPU")


def test_where_the_driver_was_opened_one_that_needs_a_gpu_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(cells, "cuda_devices", lambda: ("pretended",))
    ran: set[int] = set()

    @loader(gpu=True)
    def noted(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
        ran.add(os.getpid())
        return merged(model, lora, strength=strength)

    assert not failed(noted)
    assert ran == {os.getpid()}
