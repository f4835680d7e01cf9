"""The first sure answer: a law is told while the check goes on, and only when the whole check would say it too."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.checks.cell import Cell, cells_of
from harness.checks.examine import check_cell
from harness.checks.known import KnownFailure
from harness.checks.plan import Plan
from harness.checks.run import NOT_REACHED, check_cells
from harness.cli import main
from harness.isolation.limits import Limits
from harness.loaders.registry import resolve
from harness.verdict.verdict import Verdict
from tests.checks import sample_loaders

RAW_ALPHA = "examples/raw_alpha.py:load"
LAW = "strength * alpha"


def cell_of(name: str, bench: str = "qwen-image") -> Cell:
    cells, _ = cells_of(resolve(getattr(sample_loaders, name)), ["kohya"], [bench])
    return cells[0]


@cache
def both(name: str, examples: int = 60) -> tuple[list[Verdict], list[Verdict]]:
    """Return what was sure early of a sample loader, and what the whole check says."""
    early: list[Verdict] = []
    whole = list(check_cell(cell_of(name), Plan(examples, shrink=False), on_sure=early.append))
    return early, whole


def formula(verdict: Verdict) -> str | None:
    return verdict.law.formula if verdict.law else None


@pytest.mark.parametrize(
    "name", ["raw_alpha", "alpha_ignored", "root_of_rank", "first_alpha", "strength_ignored", "one_per_cent"]
)
def test_a_law_that_is_wrong_everywhere_is_told_once_and_the_whole_check_says_it_too(name: str) -> None:
    (early,), whole = both(name)
    same = [v for v in whole if (v.code, formula(v)) == (early.code, formula(early))]
    assert len(same) == 1
    assert early.outcome == "failed"
    assert (early.examples or 0) < (same[0].examples or 0)


def test_the_early_answer_has_the_strength_to_pass() -> None:
    (early,), _ = both("raw_alpha")
    assert (early.code, early.prescription) == ("LH201", 0.25)
    assert formula(early) == LAW


@pytest.mark.parametrize(
    "name", ["right", "no_effect", "half_precision", "only_rank_one", "truncated", "second_module"]
)
def test_what_is_no_one_law_everywhere_is_not_told_early(name: str) -> None:
    early, _ = both(name)
    assert early == []


def test_a_law_that_random_files_refute_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above rank 64, which no planned file has, the loader is wrong in another way."""

    def scale(strength: float, module: sample_loaders.LoraModule, every: list[sample_loaders.LoraModule]) -> float:
        return strength * (module.alpha or 1.0) * (0.5 if module.rank > 24 else 1.0)

    monkeypatch.setattr(sample_loaders, "raw_alpha_to_a_rank", sample_loaders.loader_with(scale), raising=False)
    early, whole = both("raw_alpha_to_a_rank")
    assert early == []
    assert any(verdict.outcome == "failed" for verdict in whole)


def test_what_is_known_is_not_told_early() -> None:
    cell = cell_of("raw_alpha")
    known = KnownFailure("raw", cell.subject.spec, "LH201", "it is known", "https://example.org")
    early: list[Verdict] = []
    whole = list(check_cell(cell, Plan(40, known=(known,), shrink=False), on_sure=early.append))
    assert early == []
    assert [v.outcome for v in whole if v.code == "LH201"] == ["xfailed"]


@pytest.mark.parametrize("workers", [0, 2])
def test_with_first_the_run_ends_at_the_first_sure_answer(workers: int) -> None:
    cells, _ = cells_of(resolve(sample_loaders.raw_alpha), ["kohya", "diffusers"], ["qwen-image", "qwen-image-fused"])
    verdicts = check_cells(cells, Plan(60), Limits(workers=workers), first=True)
    failed = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    skipped = [verdict for verdict in verdicts if verdict.outcome == "skipped"]
    assert [verdict.code for verdict in failed] == ["LH201"]
    assert {verdict.reason for verdict in skipped} == {NOT_REACHED}
    assert len(failed) + len(skipped) == len(cells)


def test_with_first_a_cell_with_a_fault_of_another_kind_is_the_last() -> None:
    cells, _ = cells_of(resolve(sample_loaders.no_effect), ["kohya", "diffusers"], ["qwen-image"])
    verdicts = check_cells(cells, Plan(3), Limits(workers=1), first=True)
    assert {(v.code, v.format) for v in verdicts if v.check == "coverage"} == {("LH101", cells[0].format)}
    assert [v.reason for v in verdicts if v.outcome == "skipped"] == [NOT_REACHED] * (len(cells) - 1)


def test_a_right_loader_is_checked_to_the_end_with_first() -> None:
    cells, _ = cells_of(resolve(sample_loaders.right), ["kohya", "diffusers"], ["qwen-image"])
    verdicts = check_cells(cells, Plan(3), Limits(workers=2), first=True)
    assert all(verdict.outcome == "passed" for verdict in verdicts)
    assert {(v.format, v.bench) for v in verdicts} == {(cell.format, cell.bench_name) for cell in cells}


def test_the_command_prints_the_answer_before_the_rest_and_stops_with_x() -> None:
    done = CliRunner().invoke(main, ["check", RAW_ALPHA, "--bench", "qwen-image", "-x"])
    assert done.exit_code == 1
    head, _, rest = done.output.partition("\n\n")
    assert head.startswith("LH201 alpha not divided by rank")
    assert re.search(r"law +strength \* alpha; expected strength \* alpha / rank", head)
    assert re.search(r"use +strength = 0\.25", head)
    assert re.search(r"sure +after \d+ files, [\d.]+ s; it stops there \(-x\)", head)
    assert NOT_REACHED in rest


def test_json_lines_hold_the_answer_once() -> None:
    done = CliRunner().invoke(main, ["check", RAW_ALPHA, "--format", "kohya", "--bench", "qwen-image", "-x", "--json"])
    assert done.exit_code == 1
    assert all(line.startswith("{") for line in done.stdout.splitlines())
    assert done.stdout.count('"code":"LH201"') == 1


def test_every_loader_has_its_own_first_answer(tmp_path: Path) -> None:
    right = tmp_path / "right.py"
    right.write_text(
        f"import sys\nsys.path.insert(0, {str(Path.cwd())!r})\nfrom tests.checks.sample_loaders import right\n"
    )
    where = ["--format", "kohya", "--bench", "qwen-image", "--max-examples", "20", "-x"]
    named = ["--name", "first", "--name", "second"]
    done = CliRunner().invoke(main, ["check", f"{right}:right", RAW_ALPHA, *where, *named])
    assert done.exit_code == 1
    assert re.search("loader +second\n", done.output.partition("\n\n")[0])
    assert re.search("^first +✓", done.output, re.MULTILINE)
