"""What commands show: progress that is redrawn seldom and not at all on request, text that stays text."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from rich.progress import Progress

from harness.commands.screen import ProgressLine, grid, print_json, progress
from harness.verdict.verdict import Verdict


class Counted(Progress):
    def __init__(self) -> None:
        super().__init__(console=Console(file=io.StringIO()), auto_refresh=False)
        self.drawn = 0

    def refresh(self) -> None:
        self.drawn += 1


def test_the_bar_is_redrawn_a_few_times_a_second() -> None:
    shown = Counted()
    bar = ProgressLine(shown)
    bar.start(5000)
    shown.drawn = 0
    for _ in range(5000):
        bar.advance()
    assert 1 <= shown.drawn < 50


def test_the_bar_counts_every_step_and_names_the_last_one_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.commands.screen._REDRAW_SECONDS", -1.0)
    shown = Counted()
    bar = ProgressLine(shown, "checking", 3)
    for what in ("first", "second", None):
        bar.advance(what)
    (task,) = shown.tasks
    assert (task.completed, task.total, task.description) == (3, 3, "second")


def test_quiet_progress_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("checking", 2, quiet=True) as line:
        line.start(5)
        line.advance("x")
    assert capsys.readouterr() == ("", "")


def test_a_grid_shows_markup_and_escapes_as_text() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    console.print(grid([("  format", "[red]x[/red]\x1b[31m")]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x[/red]" in text
    assert "\x1b[31m" not in text


def test_json_ends_in_a_footer_with_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([Verdict(loader="x", check="scale", outcome="passed", title="right")], 1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["header", "verdict", "footer"]
    assert lines[-1]["exit_code"] == 1
