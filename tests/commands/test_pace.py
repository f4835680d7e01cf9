"""The line of progress: example, time, cells and what is left; drawn where it can be, else said once a minute."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from harness.checks.cell import Cell, cells_of
from harness.checks.plan import Plan
from harness.commands import pace
from harness.commands.pace import Pace
from harness.commands.screen import ProgressLine
from harness.loaders.protocol import Defaults, Subject
from harness.loaders.registry import resolve

ROOT = Path(__file__).parents[2]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=found))
    return found


def some_cells(subject: Subject, number: int = 4) -> list[Cell]:
    return cells_of(subject)[0][:number]


def quiet_pace(cells: list[Cell], said: list[str], workers: int = 2) -> Pace:
    return Pace(cells, Plan(max_examples=100), workers, ProgressLine(None), said.append)


def test_a_line_a_minute_says_the_example_the_time_the_cells_and_what_is_left(clock: Clock) -> None:
    cells, said = some_cells(resolve("peft")), list[str]()
    each = Plan(max_examples=100).loads_in(cells[0])
    seen = quiet_pace(cells, said)
    for second in range(150):
        clock.now += 1.0
        seen.examples(cells[second % 2], 1, 0.9)
    assert len(said) == 2  # after 61 and 122 seconds, and not for each of 150 examples
    assert (
        said[0]
        == f"peft peft qwen-image lora: example 31/{each}, 61 s, 0 of 4 cells, about {minutes(said[0])} min left"
    )
    for _ in range(100):
        clock.now += 1.0
        seen.examples(cells[2], 1, 0.9)
    seen.cell(cells[0])
    seen.cell(cells[1])
    clock.now += 61.0
    seen.cell(cells[2])
    assert "3 of 4 cells" in said[-1]
    assert minutes(said[-1]) < minutes(said[1])


def minutes(line: str) -> int:
    found = re.search(r"about (\d+) min left", line)
    assert found is not None, line
    return int(found[1])


def test_what_is_left_is_about_what_it_takes(clock: Clock) -> None:
    fast, slow = (Subject(name, lambda model, path: None, declaration=resolve("peft").declaration) for name in "ab")
    cells, said = [*some_cells(fast, 1), *some_cells(slow, 1)], list[str]()
    each = Plan(max_examples=100).loads_in(cells[0])
    seen = quiet_pace(cells, said, workers=1)
    for _ in range(each):
        clock.now += 0.1
        seen.examples(cells[0], 1, 0.1)
    seen.cell(cells[0])
    clock.now += 61.0
    seen.examples(cells[1], 61, 61.0)  # ten times as slow as the other
    left = (each - 61) * 1.0
    assert abs(60 * minutes(said[-1]) - left) <= 60 if left >= 90 else f"about {left:.0f} s left" in said[-1]


def test_nothing_is_promised_before_anything_is_known(clock: Clock) -> None:
    cells, said = some_cells(resolve("peft")), list[str]()
    seen = quiet_pace(cells, said)
    clock.now += 61.0
    seen.cell(cells[0])
    assert said == [
        f"peft peft qwen-image lora: example 0/{Plan(max_examples=100).loads_in(cells[0])}, 61 s, 1 of 4 cells"
    ]


def test_a_slow_loader_is_said_to_be_slow_after_its_first_load(clock: Clock) -> None:
    subject = Subject(
        "cmd:x",
        lambda model, path: None,
        declaration=resolve("peft").declaration,
        defaults=Defaults(10, 300.0, slow=True),
    )
    cells, said = some_cells(subject), list[str]()
    seen = quiet_pace(cells, said)
    seen.examples(cells[0], 1, 4.0)
    seen.examples(cells[0], 1, 4.0)
    (line,) = said
    assert line.startswith("cmd:x: the first load took 4.0 s; a cell takes about ")


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_drawn_keeps_within_the_terminal_and_elides_long_names(width: int, clock: Clock) -> None:
    name = "cmd:python /home/somebody/a/very/long/way/down/the/tree/merge_with_everything.py --base {base}"
    subject = Subject(name, lambda model, path: None, declaration=resolve("peft").declaration)
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    shown = Progress(TextColumn("{task.description}", markup=False), console=console, auto_refresh=False)
    line = ProgressLine(shown, "checking")
    seen = Pace(some_cells(subject), Plan(), 1, line, lambda text: pytest.fail("nothing is said where it is drawn"))
    clock.now += 61.0
    seen.examples(some_cells(subject)[0], 57, 61.0)
    (task,) = shown.tasks
    assert len(task.description) <= width
    assert task.description.startswith("cmd")
    assert ": example 57/" in task.description
    assert task.description.endswith(" left")


def test_a_check_that_is_piped_says_nothing_of_its_progress() -> None:
    command = [sys.executable, "-m", "harness", "check", "peft", "--format", "peft", "--bench", "qwen-image"]
    command += ["--variant", "lora", "--max-examples", "3", "-j", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert "reference: PEFT" in done.stdout
    assert "example" not in done.stderr
