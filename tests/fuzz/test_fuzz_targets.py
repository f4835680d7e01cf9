"""A few executions of every fuzz target, and the proof that the fuzzer sees a crash and a hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_no_mutation_gets_more_than_a_sentence_out_of_a_reader(name: str) -> None:
    tally = run.fuzz(name, range(150))
    assert tally.executions == 150
    assert not tally.failures, tally.failures[0]


def test_a_crash_and_a_hang_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "SECONDS", 0.01)
    crash = Target(lambda path: 1 // 0, "x", (b"seed",))
    hang = Target(lambda path: time.sleep(0.02), "x", (b"seed",))
    assert "ZeroDivisionError" in (run.execute(crash, 0, tmp_path)[1] or "")
    assert "took" in (run.execute(hang, 0, tmp_path)[1] or "")


def test_a_seed_makes_the_same_file_everywhere() -> None:
    import random

    seeds = TARGETS["run.jsonl"].seeds[0]
    assert run.mutated(seeds, random.Random(7)) == run.mutated(seeds, random.Random(7)) != seeds
