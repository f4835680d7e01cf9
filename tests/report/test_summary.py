from __future__ import annotations

import pytest
from report_samples import IGNORED, RAW, failed, file_records, matrix_records, passed, run_of

from harness.report.models import PowerRecord
from harness.report.summary import (
    MatrixRow,
    badness,
    causes,
    cells,
    distance,
    headline,
    loader_summaries,
    matrix_columns,
    matrix_rows,
    sentence,
    short_title,
)
from harness.text import plain


def test_one_law_in_many_cells_is_one_cause_and_two_laws_are_two() -> None:
    verdicts = [failed(format=fmt, bench=bench) for fmt in ("peft", "kohya") for bench in ("a", "b")]
    assert len(causes(verdicts)) == 1
    assert len(causes([*verdicts, failed(law=RAW, code="LH201", ratio=32.0)])) == 2
    assert len(causes([*verdicts, failed("other")])) == 2


def test_also_names_the_other_places_and_not_its_own() -> None:
    verdicts = [failed(format=fmt) for fmt in ("peft", "kohya", "diffusers", "diffsynth", "glm")]
    also = causes(verdicts)[0].also()
    assert also == "the same in kohya/qwen-image, diffusers/qwen-image, diffsynth/qwen-image and 1 more"
    assert causes([failed(), failed(check="scaling law")])[0].also() == ""


def test_the_worst_failure_comes_first() -> None:
    slight, gross, crash = failed(ratio=1.01), failed(ratio=32.0), failed(outcome="errored", ratio=None)
    nothing = failed(ratio=0.0)
    assert sorted([slight, crash, gross, nothing], key=badness) == [nothing, gross, slight, crash]
    assert distance(2.0) == distance(0.5) == 1.0


def test_a_cell_is_as_bad_as_its_worst_verdict() -> None:
    run = run_of(passed(), passed(check="coverage", outcome="xfailed"), failed("peft", "strength"))
    (cell,) = cells(run).values()
    assert cell.outcome == "failed"
    assert cell.law == IGNORED
    assert cell.worst is not None
    assert cell.worst.check == "strength"


def test_the_sentence_names_loader_cause_law_and_what_was_not_measured() -> None:
    run = run_of(passed(), failed(), planned=("sweep@cuda",))
    assert sentence(run) == (
        "1 of 2 loaders does not reproduce the training. diffsynth-2.0.4: alpha ignored (LH202), law strength. "
        "Not measured: sweep@cuda."
    )


WRONG = PowerRecord(subject="a", fault="raw alpha", expected_code="LH201", trials=1, detected=1, named=0, examples=1)
RIGHT = PowerRecord(subject="b", trials=7500, detected=2, factor=1.0)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ((passed(), passed("diffusers")), "All 2 loaders reproduce the training: 2 checks passed."),
        ((passed(),), "The loader reproduces the training: 1 checks passed."),
        ((failed(),), "The loader does not reproduce the training."),
        ((), "Nothing was measured."),
        (tuple(file_records()), "1 of 2 LoRA files carry hazards."),
        ((WRONG,), "1 of 1 faults found, 0 named right."),
        ((WRONG, RIGHT), "1 of 1 faults found, 0 named right; 2 false alarms in 7,500 examples of 1 right loader."),
    ],
)
def test_the_headline_says_what_was_found(records: tuple[object, ...], says: str) -> None:
    assert headline(run_of(*records)) == says  # type: ignore[arg-type]


def test_a_green_headline_admits_what_was_not_measured() -> None:
    assert headline(run_of(passed(), planned=("sweep@cuda",))).endswith("But 1 planned part was not measured.")


def test_findings_are_one_line_per_loader() -> None:
    found = loader_summaries(run_of(*matrix_records()))  # type: ignore[arg-type]
    assert [finding.loader for finding in found] == ["raw_alpha.py:load", "diffsynth-2.0.4", "diffsynth"]


def test_a_title_loses_its_numbers_and_keeps_its_code() -> None:
    assert short_title(failed()) == "alpha ignored (LH202)"


def test_plain_text_is_left_alone_and_the_rest_is_shown() -> None:
    assert plain("strength · alpha / rank ✓ 図\n\tx") == "strength · alpha / rank ✓ 図\n\tx"
    assert plain("\x1b[31mred\u202e\x07") == "\\x1b[31mred\\u202e\\x07"
    assert plain("abcdef", 4) == "abc…"


def test_the_matrix_is_in_a_fixed_order_whatever_was_written_first() -> None:
    places = [("b", "kohya", "qwen-image-fused"), ("a", "odd", "zoo"), ("a", "peft", "qwen-image"), ("b", "peft", "x")]
    verdicts = [passed(loader, format=fmt, bench=bench) for loader, fmt, bench in places]
    pictures = passed("a", "images", format="peft", bench="base")
    grid = cells(run_of(pictures, *verdicts, planned=("checks:a", "sweep:b@cuda")))
    assert matrix_columns(grid) == ["peft", "kohya", "odd"]
    assert [(row.loader, row.bench) for row in matrix_rows(grid)] == [
        ("a", "qwen-image"),
        ("a", "zoo"),
        ("a", "base"),
        ("b", "qwen-image-fused"),
        ("b", "x"),
    ]
    row = MatrixRow("a", "base", "dora", (grid.get(("a", "peft", "base", "lora")),))
    assert row.name == "base · dora · images"


def test_a_green_line_rests_on_what_was_searched_and_not_on_what_was_tried_alone() -> None:
    seen = {"model_dtypes": ["float32"], "file_dtypes": ["float32"]}
    known = passed(check="known_failures", outcome="xfailed", examples=1)
    assert "Seen: 60 examples in float32" in sentence(run_of(passed(examples=60, data=seen), known))
