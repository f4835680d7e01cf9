from __future__ import annotations

import io

import pytest
from report_samples import HOSTILE, failed, matrix_records, passed, run_of, skipped
from rich.console import Console

from harness.report.terminal import print_run, print_verdicts


def printed(*verdicts: object, **options: object) -> str:
    file = io.StringIO()
    print_verdicts(verdicts, Console(file=file, width=110, **options))  # type: ignore[arg-type]
    return file.getvalue()


def test_a_failure_is_printed_exactly_as_its_text() -> None:
    assert failed().text() + "\n" in printed(failed())


def test_long_rows_are_not_wrapped() -> None:
    row = ("fix", "x" * 300)
    assert "x" * 300 in printed(failed(rows=(row,)))


def test_the_same_cause_is_printed_once_and_the_others_named() -> None:
    out = printed(*(failed(format=fmt) for fmt in ("peft", "kohya", "diffusers")))
    assert out.count("LH202 alpha ignored") == 1
    assert "also       the same in kohya/qwen-image, diffusers/qwen-image" in out


def test_the_matrix_shows_symbol_word_and_law() -> None:
    out = printed(passed(), failed())
    assert "✓ right" in out
    assert "✕ wrong" in out
    assert out.splitlines()[-2].strip() == "strength"


def test_the_last_line_is_the_sentence() -> None:
    assert printed(passed()).splitlines()[-1] == "The loader reproduces the training: 1 checks passed."


def test_what_was_skipped_is_said_with_its_reason() -> None:
    assert "– diffusers merge on cuda not measured: no CUDA device" in printed(passed(), skipped("diffusers"))


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in printed(failed(), force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in printed(failed(), force_terminal=True)


@pytest.mark.parametrize("text", [*HOSTILE, "[red]markup[/red]", "[link=file:///etc]x[/link]"])
def test_hostile_text_is_printed_as_text(text: str) -> None:
    out = printed(failed(text, title=text, rows=(("worst", text),), format=text))
    assert "\x1b" not in out
    assert "\u202e" not in out
    if text.isprintable():
        assert text in out


def test_a_whole_sample_night_prints(capsys: pytest.CaptureFixture[str]) -> None:
    print_run(run_of(*matrix_records()))  # type: ignore[arg-type]
    assert "3 of 5 loaders do not reproduce the training." in capsys.readouterr().out
