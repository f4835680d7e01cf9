"""The checks find and name known faults and leave right loaders alone: a part of `lora-harness selftest`."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from harness.checks.run import Limits
from harness.cli import main
from harness.commands.selftest import power_markdown
from harness.doctor.inspect.describe import inspect_file
from harness.fixtures import fixtures_folder
from harness.report.models import PowerRecord
from harness.selftest.cases import BROKEN, Case, broken_cases, correct_cases
from harness.selftest.measure import measure
from harness.variants import VARIANTS
from harness.verdict.codes import CODES

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


@pytest.mark.parametrize("case", turn(broken_cases(), 8), ids=lambda case: case.name)
def test_a_broken_loader_is_found_and_named(case: Case) -> None:
    (result,) = measure([case], max_examples=25, seeds=(), limits=Limits(seconds=5, workers=1))
    said = "\n".join(verdict.text() for verdict in result.violations)
    assert result.named, f"codes should be within {case.fault.codes}:\n{said}" if case.fault else said


@pytest.mark.parametrize(
    "name", ["directions:half_the_rows", pytest.param("convolutions:core_transposed", marks=pytest.mark.slow)]
)
def test_a_wrong_direction_that_rounding_hides_now_and_then_is_no_wrong_scale(name: str) -> None:
    (case,) = [case for case in broken_cases() if case.name == name]
    (result,) = measure([case], max_examples=120, seeds=(), limits=Limits(seconds=5, workers=1))
    assert result.named, "\n".join(verdict.text() for verdict in result.violations)


@pytest.mark.parametrize(
    ("name", "examples"),
    [("subtle:large_alpha", 30), ("variants:bias_not_scaled", 30), ("strengths:small_is_zero", 1)],
)
def test_what_few_examples_show_is_named_as_a_check_names_it(name: str, examples: int) -> None:
    (case,) = [case for case in broken_cases() if case.name == name]
    (result,) = measure([case], max_examples=examples, seeds=(), limits=Limits(seconds=5, workers=1))
    assert [verdict.code for verdict in result.violations] == [case.fault.codes[0] if case.fault else None]


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
    assert {report["hazard"] for report in reports() if "hazard" in report} == set(FLAGGED) <= set(CODES)


FLAGGED = {
    "LH701": {"unet.a.lora_A.weight": (2, 4), "unet.a.lora_B.weight": (4, 2)},
}


@pytest.mark.parametrize("code", FLAGGED)
def test_inspect_flags_the_files_of_the_index(code: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.ones(shape) for name, shape in FLAGGED[code].items()}, tmp_path / "lora.safetensors")
    assert code in {hazard.code for hazard in inspect_file(tmp_path / "lora.safetensors").hazards}


def test_every_variant_has_a_broken_and_a_right_loader() -> None:
    broken = {case.fault.variant for case in broken_cases() if case.fault}
    assert broken == {cell.variant_name for case in correct_cases() for cell in case.cells()} == set(VARIANTS)


@pytest.mark.slow  # a child for each of 375 loaders
def test_every_loader_is_tried_where_such_a_file_can_be() -> None:
    cells = [cell for case in (*broken_cases(), *correct_cases()) for cell in case.cells()]
    places = {(cell.format, cell.bench_name, cell.variant_name): cell for cell in cells}
    assert [place for place, cell in places.items() if not cell.possible] == []


def test_the_wanted_formats_and_benches_narrow_a_right_loader_where_it_declares_them() -> None:
    cases = {case.name: case for case in correct_cases()}
    places = {
        name: {(cell.format, cell.bench_name) for cell in cases[name].cells(("kohya",), ("qwen-image-fused",))}
        for name in ("in_place", "dora", "embedding")
    }
    assert places["in_place"] == places["dora"] == {("kohya", "qwen-image-fused")}
    assert places["embedding"] == {("peft", "clip-text"), ("peft", "gpt2")}


RECORDS = (
    PowerRecord(subject="x:a", fault="f", trials=1, detected=1, named=1, examples=2),
    PowerRecord(subject="x:b", fault="f", trials=1, detected=1, named=0, examples=4),
    PowerRecord(subject="y:c", fault="f", trials=1, detected=0, named=0),
    PowerRecord(subject="z", trials=200, detected=3, factor=1.0),
    PowerRecord(subject="picture", fault="f", trials=9, detected=9, images=4),
)


def test_the_table_counts_by_family_and_keeps_right_loaders_apart() -> None:
    rows = power_markdown(RECORDS).splitlines()[2:]
    assert rows == [
        "| x | 2 | 2 | 1 | 3 | |",
        "| y | 1 | 0 | 0 | – | |",
        "| **all that are wrong** | 3 | 2 | 1 | 3 | |",
        "| **all that are right** | 1 | | | | 3 in 200 examples |",
    ]


def test_selftest_reports_what_it_measured_and_reads_it_again(tmp_path: Path) -> None:
    options = ["--only", "subtle:five_per_cent", "--quick", "--max-examples", "3", "-j", "1", "--markdown"]
    done = CliRunner().invoke(main, ["selftest", *options, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| subtle | 1 | 1 | 1 | 1 | |" in done.output
    again = CliRunner().invoke(main, ["selftest", "--from", str(tmp_path / "run.jsonl"), "--markdown"])
    assert again.output == done.output
    assert "5 % too strong" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_examples_of_a_right_loader_are_shared_by_its_cells() -> None:
    options = ["--kind", "right", "--only", "embedding", "--except", "none such", "--right-examples", "8"]
    done = CliRunner().invoke(main, ["selftest", *options, "--max-examples", "1", "-j", "1", "--json"])
    assert done.exit_code == 0, done.output
    (record,) = [json.loads(line) for line in done.output.splitlines() if '"power"' in line and '"embedding"' in line]
    (case,) = [case for case in correct_cases() if case.name == "embedding"]
    assert record["trials"] == measure([case], max_examples=4, seeds=(), limits=Limits(workers=1))[0].examples
    nothing = CliRunner().invoke(main, ["selftest", "--kind", "wrong", "--only", "embedding", "--except", "e"])
    assert nothing.exit_code == 2


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
