"""Several loaders drawn at once: each gets its own verdict, in whatever order they end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.images import SweepOptions, SweepResult, run_sweep
from harness.images.sweep import run_sweeps
from harness.loaders.protocol import Subject

from .subjects import raw_alpha, times

pytestmark = pytest.mark.images


class Heard:
    def __init__(self) -> None:
        self.records: dict[int, list[dict[str, Any]]] = {}
        self.results: dict[int, SweepResult | UserError] = {}

    def record(self, index: int, record: dict[str, Any]) -> None:
        assert index not in self.results
        self.records.setdefault(index, []).append(record)

    def ended(self, index: int, result: SweepResult | UserError) -> None:
        assert index not in self.results
        self.results[index] = result


def dies(model: object, lora: Path, *, strength: float = 1.0) -> None:
    if strength > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_of_several_loaders_gets_its_own_verdict(tiny, r8_a16, workers: int) -> None:
    subjects = [raw_alpha(), Subject("dies", dies), times(1)]
    options = SweepOptions(alphas=(0, 1), pipeline=tiny, lora=r8_a16, quick=True, progress=False, workers=workers)
    heard = Heard()
    run_sweeps(subjects, options, heard)
    (raw, died, right) = (heard.results[index] for index in range(3))
    assert isinstance(raw, SweepResult)
    assert isinstance(died, SweepResult)
    assert isinstance(right, SweepResult)
    assert [found.verdicts[0].outcome for found in (raw, died, right)] == ["failed", "errored", "passed"]
    assert [found.verdicts[0].loader for found in (raw, died, right)] == [subject.spec for subject in subjects]
    assert all(found.environment["device"] == "cpu" for found in (raw, died, right))
    alone = run_sweep(subjects[0], options)
    assert alone.verdicts[0].estimated_factor == raw.verdicts[0].estimated_factor
    assert [row["metrics"] for row in alone.records] == [row["metrics"] for row in heard.records[0]]


def test_why_none_can_be_drawn_with_is_said_of_each(tiny, tmp_path: Path) -> None:
    options = SweepOptions(pipeline=tiny, lora=tmp_path / "none.safetensors", quick=True, progress=False, workers=2)
    heard = Heard()
    run_sweeps([times(1), raw_alpha()], options, heard)
    assert sorted(heard.results) == [0, 1]
    assert all(isinstance(each, UserError) and "none.safetensors" in str(each) for each in heard.results.values())
