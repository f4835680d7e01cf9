"""What the commands show: progress on stderr, tables and JSON lines on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

_WIDTH = 180  # of what is piped into a file
_REDRAW_SECONDS = 0.25


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


@contextmanager
def progress(what: str, total: int | None = None, *, quiet: bool) -> Iterator[ProgressLine]:
    """Show on stderr how far a command is, and take it away at the end."""
    if quiet:
        yield ProgressLine(None)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as shown:
        line = ProgressLine(shown, what, total)
        shown.refresh()
        yield line


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
        writer.write(*records)
        writer.exit_code = exit_code
