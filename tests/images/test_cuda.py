"""Pictures on CUDA without a GPU: `.to("cuda")` stays on the CPU here, and writes down which process asked for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.images import base_pipeline, open_pipeline, run_sweep
from harness.images.studio import Studio
from harness.isolation import device as devices
from harness.loaders.protocol import Subject
from harness.loaders.registry import resolve

from .subjects import times

pytestmark = pytest.mark.images


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], set[int]]:
    """A GPU that no process forked from one that used it can use; returns the processes that did."""
    notes, opened_by = tmp_path / "touched", []

    def note() -> None:
        if opened_by and opened_by != [os.getpid()]:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        opened_by[:] = [os.getpid()]
        with notes.open("a") as file:
            file.write(f"{os.getpid()}\n")

    def staying(move):
        def to(self, *arguments, **keywords):
            for value in (*arguments, *keywords.values()):
                if torch.device("cuda") in (value, value if not isinstance(value, str) else torch.device(value)):
                    note()
            here = [torch.device("cpu") if a in ("cuda", torch.device("cuda")) else a for a in arguments]
            return move(self, *here, **{k: "cpu" if v == torch.device("cuda") else v for k, v in keywords.items()})

        return to

    def forbidden(*_: object) -> None:
        raise AssertionError("the driver was opened")

    monkeypatch.setattr("harness.images.pipelines.cuda_devices", lambda: ("pretended",))
    monkeypatch.setattr(torch.nn.Module, "to", staying(torch.nn.Module.to))
    monkeypatch.setattr(torch.Tensor, "to", staying(torch.Tensor.to))
    monkeypatch.setattr(torch.cuda, "_lazy_init", forbidden)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(note()))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 123)
    return lambda: {int(line) for line in notes.read_text().split()} if notes.is_file() else set()


def drawn(loader: Subject, lora: Path, **more):
    few = {"alphas": (0.0, 1.0), "prompts": ["red circle on dark"], "seeds": (0, 1), "progress": False}
    opened = open_pipeline(base_pipeline(), device="cuda", dtype=torch.float32, steps=2)
    return run_sweep(loader, pipeline=opened, lora=lora, **(few | more))


@pytest.mark.parametrize("quick", [False, True])
def test_neither_the_run_nor_its_judge_opens_the_driver(touched, r8_a16, quick: bool):
    found = drawn(times(2), r8_a16, quick=quick)
    assert found.verdicts[0].code == "LH602", found.verdicts[0].text()
    assert found.verdicts[0].estimated_factor == pytest.approx(2, rel=0.1)
    assert len(touched()) == 2  # one process draws the references, one is the subject's
    assert os.getpid() not in touched()
    assert found.records[0]["peak_memory"] == 123


def test_without_a_worker_everything_is_drawn_here(touched, r8_a16):
    assert drawn(resolve("peft"), r8_a16, workers=0).verdicts[0].outcome == "passed"
    assert touched() == {os.getpid()}


@pytest.mark.parametrize(
    "end", [lambda: os._exit(0), lambda: os.kill(os.getpid(), signal.SIGSEGV), lambda: time.sleep(60)]
)
def test_a_loader_that_ends_its_process_or_hangs_is_an_errored_verdict(touched, r8_a16, end: Callable[[], object]):
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        if strength > 0.5:
            end()

    found = drawn(Subject("hostile", load), r8_a16, time_limit=1)
    assert [(v.outcome, v.code) for v in found.verdicts] == [("errored", "LH901")]
    assert [row["strength"] for row in found.records] == [0.0]


def test_a_device_that_fails_is_no_fault_of_the_loader(touched, r8_a16, monkeypatch):
    def failing(self, strength):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Studio, "paint", failing)
    with pytest.raises(UserError, match=r"cuda: the reference's pictures could not be drawn: .*launch failure"):
        drawn(times(1), r8_a16, seeds=(7,))


def test_a_device_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr("harness.images.pipelines.cuda_devices", lambda: ("one",))
    for name in ("cuda:1", "graphics"):
        with pytest.raises(UserError, match=f"device='{name}'"):
            open_pipeline(base_pipeline(), device=name)


def test_a_child_asks_which_devices_there_are(monkeypatch, tmp_path: Path):
    asked = tmp_path / "asked"

    def count() -> int:
        asked.write_text(str(os.getpid()))
        return 2

    monkeypatch.setattr(devices, "_built_for_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    devices.cuda_devices.cache_clear()
    try:
        assert devices.cuda_devices() == ("card 0", "card 1")
        assert int(asked.read_text()) != os.getpid()
    finally:
        devices.cuda_devices.cache_clear()
