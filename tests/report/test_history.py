from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from report_samples import TRAINED, failed, matrix_records, passed, run_of

from harness.errors import UserError
from harness.report.environment import new_header
from harness.report.history import (
    Trend,
    append_history,
    flips,
    history_record,
    history_text,
    merge_history,
    read_history,
)
from harness.report.html import write_report
from harness.report.records import Run


def night(day: int, version: str, *, right: bool, **changes: object) -> Run:
    stamp = {"run_id": f"night-{day}", "created": f"2026-11-{day:02d}T02:00:00+00:00"} | changes
    facts = {"loader_version": version, "check": "scaling law"}
    if right:
        return run_of(passed("diffsynth", law=TRAINED, **facts), **stamp)
    return run_of(failed("diffsynth", **facts), **stamp)


def test_two_nights_with_another_loader_version_show_the_flip() -> None:
    history = [history_record(night(1, "2.0.4", right=False)), history_record(night(2, "2.0.5", right=True))]
    (flip,) = flips(history)
    assert flip.text() == (
        "diffsynth 2.0.4 -> 2.0.5: law `strength` -> `strength * alpha / rank`, wrong -> right (kohya/qwen-image)"
    )
    assert flip.direction == "better"
    assert flips(history[::-1]) == [flip]


def test_a_flip_back_is_worse_and_comes_first() -> None:
    history = [history_record(night(d, "2.0.5", right=r)) for d, r in ((1, False), (2, True), (3, False))]
    assert [flip.direction for flip in flips(history)] == ["worse", "better"]


def test_an_unchanged_cell_does_not_flip_and_a_gap_is_bridged() -> None:
    same = [history_record(night(day, "2.0.4", right=False)) for day in (1, 2, 3)]
    assert flips(same) == []
    gap = history_record(run_of(passed("peft"), run_id="gap", created="2026-11-02T02:00:00+00:00"))
    changed = [same[0], gap, history_record(night(3, "2.0.5", right=True))]
    assert len(flips(changed)) == 1


def test_a_gpu_night_is_not_compared_with_a_cpu_night() -> None:
    cpu = history_record(night(1, "2.0.4", right=False))
    gpu = history_record(night(2, "2.0.4", right=True, device="cuda (sample)"))
    assert flips([cpu, gpu]) == []


def test_cells_that_change_alike_are_one_flip() -> None:
    def both(day: int, make: object, **facts: object) -> Run:
        stamp = {"run_id": str(day), "created": f"2026-11-{day:02d}T02:00:00+00:00"}
        return run_of(*(make("x", format=fmt, **facts) for fmt in ("peft", "kohya")), **stamp)  # type: ignore[operator]

    (flip,) = flips([history_record(both(1, passed)), history_record(both(2, failed))])
    assert flip.places == ("peft/qwen-image", "kohya/qwen-image")
    assert flip.direction == "worse"


def test_the_history_grows_by_one_line_per_run_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "history.jsonl"
    run = night(1, "2.0.4", right=False)
    assert append_history(path, run) == append_history(path, run)
    append_history(path, night(2, "2.0.5", right=True))
    assert [record.run_id for record in read_history(path)] == ["night-1", "night-2"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_histories_of_several_machines_merge_by_run_id_in_time_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    append_history(one, night(1, "1", right=True))
    append_history(one, night(3, "1", right=True))
    append_history(two, night(2, "1", right=True, machine="other"))
    append_history(two, night(3, "1", right=True))
    assert [record.run_id for record in read_history(one, two)] == ["night-1", "night-2", "night-3"]
    assert read_history(two, one) == read_history(one, two)


SECOND = "2026-11-01T02:00:00+00:00"
MICROSECOND = "2026-11-01T02:00:00.000001+00:00"


@pytest.mark.parametrize("ids", list(permutations("abc")), ids="".join)
@pytest.mark.parametrize("stamps", [(SECOND,) * 3, (SECOND, MICROSECOND, MICROSECOND)], ids=["seconds", "mixed"])
def test_runs_of_one_second_keep_the_order_of_their_file(
    tmp_path: Path, ids: tuple[str, ...], stamps: tuple[str, ...]
) -> None:
    path, rights = tmp_path / "history.jsonl", (False, True, False)
    for name, stamp, right in zip(ids, stamps, rights, strict=True):
        append_history(path, night(1, "1", right=right, run_id=name, created=stamp))
    history = read_history(path)
    assert [record.run_id for record in history] == list(ids)
    assert [flip.run_id for flip in flips(history)] == [ids[2], ids[1]]
    assert [flip.direction for flip in Trend(history).flips] == ["worse", "better"]
    assert [bar.record.run_id for bar in Trend(history).bars] == list(ids)
    assert history_text(history).count(": law `") == 2


@pytest.mark.parametrize("ids", list(permutations("abcd")), ids="".join)
def test_files_of_one_second_merge_whole_and_in_any_order(tmp_path: Path, ids: tuple[str, ...]) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path, names in ((one, ids[:3]), (two, (ids[0], ids[3]))):
        for name in names:
            append_history(path, night(1, "1", right=True, run_id=name))
    merged = [record.run_id for record in read_history(one, two)]
    assert sorted(merged) == sorted(ids)
    assert [name for name in merged if name in ids[:3]] == list(ids[:3])
    assert merged.index(ids[0]) < merged.index(ids[3])
    assert read_history(two, one) == read_history(one, two)


def test_two_runs_have_two_times() -> None:
    first, second = new_header([]).created, new_header([]).created
    assert first < second


def test_key_numbers_hold_what_a_trend_needs() -> None:
    record = history_record(run_of(*matrix_records()))  # type: ignore[arg-type]
    wrong = next(cell for cell in record.cells if cell.loader == "diffsynth-2.0.4" and cell.format == "kohya")
    assert (wrong.outcome, wrong.code, wrong.law, wrong.ratio) == ("failed", "LH202", "strength", 0.5)
    assert wrong.version == "2.0.4"
    assert record.status == "failed"


def test_a_bad_history_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"kind":"history"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"history\.jsonl:1: not a history record: run_id"):
        read_history(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_history(tmp_path / "absent.jsonl")


def test_the_history_as_text_has_runs_and_changes() -> None:
    history = [history_record(night(1, "2.0.4", right=False)), history_record(night(2, "2.0.5", right=True))]
    text = history_text(history)
    assert "2026-11-01T02:00  failed      1 failed" in text
    assert "2026-11-02  diffsynth 2.0.4 -> 2.0.5: law" in text


def test_a_trend_needs_two_runs_and_keeps_the_last_thirty() -> None:
    records = [history_record(night(1 + d % 28, "1", right=True, run_id=str(d))) for d in range(40)]
    assert Trend(records[:1]).bars == []
    assert len(Trend(records).bars) == 30
    assert merge_history(records)[-30:] == [bar.record for bar in Trend(records).bars]


def test_bars_stay_inside_the_drawing() -> None:
    history = [history_record(run_of(*matrix_records(), run_id=str(n))) for n in range(2)]  # type: ignore[arg-type]
    parts = Trend(history).bars[0].parts
    assert parts[0].outcome == "failed"
    assert all(part.top >= 0 and part.top + part.height <= Trend.height for part in parts)


def test_a_damaged_line_costs_itself_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history.jsonl"
    append_history(path, night(1, "2.0.4", right=False))
    path.write_bytes(path.read_bytes() + b'{"kind": "history", "run_i\n' + b"\0" * 512)
    append_history(path, night(2, "2.0.5", right=True, machine="a\u2028b\x85c"))
    assert [record.run_id for record in read_history(path)] == ["night-1", "night-2"]
    assert "line 2 is damaged and passed over; 2 runs kept" in capsys.readouterr().err


def test_a_cut_last_line_is_ended_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_history(path, night(1, "2.0.4", right=False))
    append_history(path, night(2, "2.0.4", right=False))
    path.write_bytes(path.read_bytes()[:-30])
    append_history(path, night(3, "2.0.5", right=True))
    assert [record.run_id for record in read_history(path)] == ["night-1", "night-3"]


def test_every_loader_has_a_trend_a_sign_per_run() -> None:
    history = [history_record(night(day, "2.0.4", right=day > 1)) for day in (1, 2, 3)]
    gone = history[1].model_copy(update={"run_id": "gone", "created": "2026-11-02T12:00:00+00:00", "cells": ()})
    trend = Trend([*history, gone])
    assert [(name, [outcome for _, outcome in runs]) for name, runs in trend.loaders] == [
        ("diffsynth", ["failed", "passed", None, "passed"])
    ]
    assert "  diffsynth  ✕✓·✓" in history_text([*history, gone]).splitlines()
    assert Trend(history[:1]).loaders == []


def test_the_page_shows_the_trend_of_every_loader(tmp_path: Path) -> None:
    history = [history_record(night(day, "2.0.4", right=day > 1)) for day in (1, 2)]
    text = write_report([night(2, "2.0.4", right=True)], tmp_path, history=history).read_text(encoding="utf-8")
    assert '2026-11-01: wrong">✕</span><span class="mark passed" title="2026-11-02: right">✓</span>' in text
