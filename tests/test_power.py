"""The checks find and name known faults and leave right loaders alone: a part of `lora-harness selftest`."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from typing import Any

import pytest

from harness.checks.codes import CODES
from harness.checks.run import Limits
from harness.fixtures import fixtures_folder
from harness.power.cases import BROKEN, Case, broken_cases, correct_cases
from harness.power.measure import measure

# Continuous integration may count this up, so that in time every loader has its turn; the whole zoo is `selftest`.
ROTATION = int(os.environ.get("LORA_HARNESS_ROTATION", "0"))
STATES = ("later", "loader", "hazard", "why")


def turn(cases: list[Case], count: int) -> list[Case]:
    step = max(1, len(cases) // count)
    return [cases[(ROTATION + i * step) % len(cases)] for i in range(count)]


@cache
def reports() -> list[dict[str, Any]]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads((fixtures_folder() / BROKEN / "index.toml").read_text(encoding="utf-8"))["report"]


@pytest.mark.slow
@pytest.mark.parametrize("case", turn(broken_cases(), 8), ids=lambda case: case.name)
def test_a_broken_loader_is_found_and_named(case: Case) -> None:
    (result,) = measure([case], max_examples=25, seeds=(), limits=Limits(seconds=5, workers=1))
    said = "\n".join(verdict.text() for verdict in result.violations)
    assert result.named, f"codes should be within {case.fault.codes}:\n{said}" if case.fault else said


@pytest.mark.slow
@pytest.mark.parametrize("case", turn(correct_cases(), 4), ids=lambda case: case.name)
def test_a_right_loader_is_never_blamed(case: Case) -> None:
    (result,) = measure(
        [case], max_examples=25, formats=("kohya",), benches=("qwen-image-fused",), limits=Limits(seconds=5, workers=1)
    )
    assert result.right, "\n".join(verdict.text() for verdict in result.violations)
    assert result.examples >= 25


def test_every_reported_bug_has_a_loader_or_a_reason() -> None:
    assert len({report["id"] for report in reports()}) == len(reports()) == 170
    for report in reports():
        assert set(report) - {"id", "link"} in [{state} for state in STATES], report["id"]
        assert report["link"].startswith("https://"), report["id"]


def test_every_loader_of_the_index_exists_and_every_hazard_is_a_code() -> None:
    names = {case.name for case in broken_cases()}
    assert {report["loader"] for report in reports() if "loader" in report} <= names
    assert {report["hazard"] for report in reports() if "hazard" in report} <= set(CODES)


def test_every_fault_has_codes_and_its_own_words() -> None:
    cases = broken_cases()
    assert all(code in CODES for case in cases if case.fault for code in case.fault.codes)
    words = Counter((case.name.partition(":")[0], case.fault.what) for case in cases if case.fault)
    assert [what for what, count in words.items() if count > 1] == []


def test_there_are_at_least_25_styles_of_right_loaders() -> None:
    assert len(correct_cases()) >= 25


@pytest.mark.parametrize("name", ["hangs", "dies", "exits", "segmentation_fault", "leaks"])
def test_a_loader_that_ends_its_process_costs_one_errored_verdict(name: str) -> None:
    cases = [case for case in broken_cases() if case.name in (f"crashes:{name}", "crashes:raises")]
    results = measure(cases, max_examples=5, seeds=(), limits=Limits(seconds=5, workers=1))
    assert [[verdict.outcome for verdict in result.violations] for result in results] == [["errored"], ["errored"]]
