"""What the commands show: progress on stderr, tables and JSON lines on stdout."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from harness.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

_WIDTH = 180  # of what is piped into a file
_REDRAW_SECONDS = 0.25
_COMMAND = re.compile(r"((?:^|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029])\s*)::")


class ProgressLine:
    """How far a command is, redrawn by hand: a refreshing thread must not run while children are forked."""

    def __init__(self, shown: Progress | None, what: str = "", total: int | None = None) -> None:
        self._shown, self._done, self._drawn = shown, 0, 0.0
        self._task = shown.add_task(what, total=total) if shown else None

    def start(self, total: int) -> None:
        """Say how many steps there are, where that was not known before."""
        if self._shown and self._task is not None:
            self._shown.update(self._task, total=total)

    def advance(self, what: str | None = None) -> None:
        """Count one step more, which was `what`."""
        self._done += 1
        if self._shown and self._task is not None and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._shown.update(self._task, completed=self._done, description=what)
            self._shown.refresh()
            self._drawn = time.monotonic()

    def describe(self, what: str) -> None:
        """Say what is being done."""
        if self._shown and self._task is not None and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._shown.update(self._task, description=what)
            self._shown.refresh()
            self._drawn = time.monotonic()

    @property
    def width(self) -> int:
        """How many characters a line has, 0 where nothing is redrawn."""
        return self._shown.console.width if self._shown else 0

    def say(self, text: str) -> None:
        """Print a line on stderr that stays."""
        if self._shown:
            self._shown.console.print(printable(text, 400), markup=False, highlight=False)
        else:
            print(printable(text, 400), file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int | None = None, *, quiet: bool, bar: bool = True) -> Iterator[ProgressLine]:
    """Show on stderr how far a command is, as a bar or in words alone, and take it away at the end."""
    if quiet:
        yield ProgressLine(None)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    words = TextColumn("{task.description}", markup=False)
    columns = (words, *Progress.get_default_columns()[1:2], MofNCompleteColumn(), TimeRemainingColumn())
    columns = columns if bar else (words,)
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as shown:
        line = ProgressLine(shown, what, total)
        shown.refresh()
        yield line


class WithoutCommands:
    """A stream for GitHub's runner, which obeys lines that begin with `::`, and `##[` anywhere: neither is let through.

    What a file, a loader or a record says must not set an output, hide an error or make one up.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._begins = stream, True

    def write(self, text: str) -> int:
        """Write text in which commands are spelled so that they are none."""
        begun = "" if self._begins else "\0"  # what goes on in a line does not begin one
        safe = _COMMAND.sub(r"\1\\u003a:", begun + text).replace("##[", "##\\u005b")[len(begun) :]
        self.stream.write(safe)
        self._begins = text.endswith(("\n", "\r")) or (self._begins and not text.strip())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def obey_no_text() -> None:
    """Let nothing that is printed from here on be a command of GitHub's runner, where it would be obeyed."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        sys.stdout, sys.stderr = (_guarded(stream) for stream in (sys.stdout, sys.stderr))


def _guarded(stream: Any) -> Any:
    return stream if stream is None or isinstance(stream, WithoutCommands) else WithoutCommands(stream)


def say_to_the_runner(line: str) -> None:
    """Print a command that GitHub's runner is to obey."""
    stream = sys.stdout.stream if isinstance(sys.stdout, WithoutCommands) else sys.stdout
    stream.write(f"{line}\n")


def stdout_console() -> Console:
    """Return a console for tables and styled lines, which are not broken where they are piped into a file."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def grid(rows: Iterable[Sequence[str]]) -> Table:
    """Return rows of text in columns; text out of a file stays text."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*(Text(printable(cell, 400)) for cell in row))
    return table


def print_json(records: Iterable[Any], exit_code: int) -> None:
    """Print records as JSON lines between a header and a footer that says `exit_code`."""
    from harness.report.environment import new_header
    from harness.report.records import RunWriter

    with RunWriter(None, new_header(), echo=sys.stdout) as writer:
        for record in records:  # there may be a million
            writer.write(record)
        writer.exit_code = exit_code
