"""How far the checks are, and, of loaders that take seconds for each load, how long they will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness.commands.screen import ProgressLine

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.checks.plan import Plan

_WORTH_SAYING = 30.0  # seconds that cells will take
_SAY_AGAIN = 60.0


class Pace:
    """Counts cells and the loads of slow loaders; `say` prints a line where nothing is redrawn."""

    def __init__(
        self, cells: Sequence[Cell], plan: Plan, workers: int, line: ProgressLine, say: Callable[[str], None] | None
    ) -> None:
        self._cells, self._plan, self._workers, self._line, self._say = cells, plan, max(1, workers), line, say
        self._loads: Counter[Cell] = Counter()
        self._estimated = False
        self._said = time.monotonic()

    def cell(self, cell: Cell) -> None:
        """Count a cell that is done."""
        self._line.advance(_shown(cell))

    def load(self, cell: Cell, seconds: float) -> None:
        """Count a load of a slow loader, which took `seconds`."""
        self._loads[cell] += 1
        expected = self._plan.loads_in(cell)
        if not self._estimated:
            self._estimate(cell, expected, seconds)
        told = f"{_shown(cell)}: load {self._loads[cell]} of about {max(expected, self._loads[cell])}"
        self._line.describe(told)
        if self._say and self._estimated and time.monotonic() - self._said > _SAY_AGAIN:
            self._tell(told)

    def _estimate(self, cell: Cell, expected: int, seconds: float) -> None:
        self._estimated = True
        cells = [each for each in self._cells if each.subject == cell.subject]
        one = expected * seconds
        whole = sum(self._plan.loads_in(each) for each in cells) * seconds / min(self._workers, len(cells))
        if whole < _WORTH_SAYING:
            self._say = None
            return
        more = f", {_lasting(whole)} for its {len(cells)} cells" if len(cells) > 1 else ""
        self._tell(
            f"{cell.subject.title}: the first load took {seconds:.1f} s; a cell takes about {expected} loads, so "
            f"{_lasting(one)}{more} (fewer with --max-examples, --format and --bench)"
        )

    def _tell(self, text: str) -> None:
        self._said = time.monotonic()
        if self._say:
            self._say(text)


def _shown(cell: Cell) -> str:
    return f"{cell.subject.title[:24]} {cell.format} {cell.bench_name} {cell.variant_name}"[:50]


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
