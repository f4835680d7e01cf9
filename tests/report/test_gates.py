from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import failed, passed, run_of, skipped, sweep

from harness.errors import UserError
from harness.report.gates import Rule, compare, parse_rule


def texts(*args: object) -> list[str]:
    return [result.text() for result in compare(*args)]  # type: ignore[arg-type]


def test_the_same_run_opens_the_gate() -> None:
    run = run_of(passed(), failed())
    assert compare(run, run, ["ratio:any:0.001", "run.seconds:up:10%"]) == []


def test_a_new_violation_closes_it_and_an_old_one_does_not() -> None:
    before, after = run_of(passed("a"), failed("b")), run_of(failed("a"), failed("b"))
    assert texts(before, after) == ["new violation: a kohya/qwen-image: alpha ignored (LH202)"]


def test_another_code_in_the_same_place_is_new() -> None:
    before, after = run_of(failed()), run_of(failed(code="LH201", title="alpha not divided by rank"))
    assert texts(before, after) == [
        "new violation: diffsynth-2.0.4 kohya/qwen-image: alpha not divided by rank (LH201)"
    ]


def test_a_recorded_known_failure_opens_the_gate_again() -> None:
    before = run_of(passed("a"))
    assert compare(before, run_of(failed("a", "scale")))
    known = run_of(failed("a", "scale", outcome="xfailed", reason="https://example.org/issues/1"))
    assert compare(before, known) == []


def test_lost_coverage_closes_it() -> None:
    before = run_of(passed("a"), passed("a", "coverage"), passed("b"))
    after = run_of(passed("a"), skipped("b"))
    assert texts(before, after) == [
        "lost coverage: a kohya/qwen-image: measured in the baseline, not measured now: coverage",
        "lost coverage: b kohya/qwen-image: measured in the baseline, not measured now: scale",
    ]


def test_a_sweep_that_is_gone_is_lost_coverage(tmp_path: Path) -> None:
    records = sweep(tmp_path, "peft", 1.0, prompts=1)
    lost = texts(run_of(*records), run_of(*records[:-1]))
    assert lost == ["lost coverage: peft sample-r8-a16 on cpu: no pictures at strength 32 now"]


def test_a_cut_run_closes_it() -> None:
    run = run_of(passed())
    cut = type(run)(run.header, run.records, None)
    assert texts(run, cut) == ["whole run: run: the run has no footer"]


@pytest.mark.parametrize(
    ("rule", "before", "after", "broken"),
    [
        ("ratio:any:0.01", 1.0, 1.02, True),
        ("ratio:any:0.01", 1.0, 0.98, True),
        ("ratio:any:0.01", 1.0, 1.005, False),
        ("ratio:up:0.01", 1.0, 0.5, False),
        ("ratio:down:0.01", 1.0, 0.5, True),
        ("seconds:up:20%", 10.0, 12.5, True),
        ("seconds:up:20%", 10.0, 11.5, False),
        ("ratio:any:0.01", 1.0, float("nan"), True),
        ("ratio:any:0.01", float("inf"), float("inf"), False),
    ],
)
def test_a_metric_past_its_rule_closes_it(rule: str, before: float, after: float, broken: bool) -> None:
    field = rule.split(":")[0]
    results = compare(run_of(passed(**{field: before})), run_of(passed(**{field: after})), [rule])
    assert bool(results) is broken
    assert all(result.rule == rule for result in results)


def test_sweep_metrics_are_compared_strength_by_strength(tmp_path: Path) -> None:
    before, after = sweep(tmp_path, "peft", 1.0, prompts=1), sweep(tmp_path, "peft", 4.0, prompts=1)
    found = texts(run_of(*before), run_of(*after), ["sweep.ssim_reference:down:0.5"])
    assert found[0] == (
        "sweep.ssim_reference:down:0.5: peft sample-r8-a16 on cpu at 1: sweep.ssim_reference was 1, is 0.4"
    )


@pytest.mark.parametrize(
    "text", ["ratio", "ratio:up", "ratio:sideways:1", "ratio:up:x", "loader:up:1", "sweep.:up:1", ""]
)
def test_what_is_no_rule_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(UserError, match="a rule is FIELD:up"):
        parse_rule(text)


def test_a_rule_prints_as_it_is_written() -> None:
    assert parse_rule("run.seconds:up:20%") == Rule("run.seconds", "up", 0.2, relative=True)
    assert parse_rule("run.seconds:up:20%").name == "run.seconds:up:20%"


def test_a_baseline_that_is_not_whole_is_refused() -> None:
    run = run_of(passed())
    cut = replace(run, cut="the last line (2) is truncated")
    for part in (replace(run, footer=None), cut, replace(run, records=())):
        with pytest.raises(UserError, match="is no baseline"):
            compare(part, run)
