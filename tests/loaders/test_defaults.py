"""How many examples and seconds a loader gets when nobody says: one answer, whichever door it comes in by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from harness import Verdict, check_loader, measure_law, parametrize_with_checks
from harness.checks import law, run
from harness.cli import main
from harness.isolation.jobs import JobEnd
from harness.isolation.limits import Limits
from harness.loaders.protocol import IMPLIED_BENCHES
from harness.loaders.registry import resolve

COMMAND = "cmd:sh -c true {base} {lora} {strength} {out}"
FUNCTION = str(Path(__file__).parents[2] / "examples" / "raw_alpha.py") + ":load"
EXPECTED = {COMMAND: (10, 120.0), FUNCTION: (200, 20.0)}
ONE = {"formats": ["peft"], "benches": ["qwen-image"]}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a check answer with the numbers that it was given."""

    def check_cell(cell: Any, plan: Any, on_measured: object) -> Iterator[Verdict]:
        numbers = {"examples": plan.examples_in(cell), "seconds": cell.allowed}
        yield cell.verdict("smoke", "passed", **numbers)

    monkeypatch.setattr(run, "check_cell", check_cell)


def numbers(verdicts: list[Verdict]) -> set[tuple[int | None, float | None]]:
    return {(v.examples, v.seconds) for v in verdicts if v.bench not in IMPLIED_BENCHES}


def cli(*args: str) -> set[tuple[int, float]]:
    lines = CliRunner().invoke(main, [*args, "--json", "-j", "1"]).stdout.splitlines()
    smoke = (line for line in map(json.loads, lines) if line.get("check") == "smoke")
    return {(line["examples"], line["seconds"]) for line in smoke if line["bench"] not in IMPLIED_BENCHES}


@pytest.mark.parametrize("spec", EXPECTED, ids=["command", "function"])
def test_every_door_asks_the_subject(spec: str, tmp_path: Path) -> None:
    checks = parametrize_with_checks([spec], **ONE).args[1]
    by_door = {
        "check": cli("check", spec, "--format", "peft", "--bench", "qwen-image"),
        "run": cli("run", "--loader", spec, "--no-images", "--out", str(tmp_path)),
        "check_loader": numbers(check_loader(spec, **ONE)),
        "parametrize_with_checks": numbers(checks[0].verdicts()),
    }
    assert by_door == {door: {EXPECTED[spec]} for door in by_door}


def test_what_is_asked_for_wins() -> None:
    asked = numbers(check_loader(COMMAND, **ONE, max_examples=3, limits=Limits(seconds=7)))
    assert asked == cli("check", COMMAND, "--max-examples", "3", "--time-limit", "7") == {(3, 7.0)}


@pytest.mark.parametrize(("spec", "examples"), [(COMMAND, 10), (FUNCTION, 30)], ids=["command", "function"])
def test_a_quick_run_asks_for_no_more_than_a_full_one(spec: str, examples: int, tmp_path: Path) -> None:
    found = cli("run", "--quick", "--loader", spec, "--no-images", "--out", str(tmp_path))
    assert {count for count, _ in found} == {examples}


def test_the_law_is_measured_under_the_subjects_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(law, "_measured", lambda cell, alpha, uniform: seen.append(cell.allowed))
    monkeypatch.setattr(law, "done_apart", lambda cell, work: (work(cell), JobEnd("done")))
    for spec in EXPECTED:
        measure_law(spec)
    assert seen == [120.0, 120.0, 20.0, 20.0]  # no probe at all, so files of one rank each are tried too


def test_the_environment_changes_the_limit_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_COMMAND_SECONDS", "600")
    assert resolve(COMMAND).defaults.seconds == 600
