"""How far the checks are: the example, the cells, the time so far, and about how much of it is left."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness.commands.screen import ProgressLine
from harness.text import elided, printable

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.checks.plan import Plan

_WORTH_SAYING = 30.0  # seconds that the cells of a slow loader will take
_SAY_AGAIN = 60.0
_KNOWS_AFTER = 5.0
_NAME = 60


class Pace:
    """Counts examples and cells; `say` prints a line that stays, a minute after the last one at the earliest."""

    def __init__(
        self, cells: Sequence[Cell], plan: Plan, workers: int, line: ProgressLine, say: Callable[[str], None] | None
    ) -> None:
        self._cells, self._plan, self._workers, self._line, self._say = cells, plan, max(1, workers), line, say
        self._tried: Counter[Cell] = Counter()
        self._expected: dict[Cell, int] = {}
        self._done: set[Cell] = set()
        self._seconds: defaultdict[str, float] = defaultdict(float)  # that examples took, by loader
        self._examples: Counter[str] = Counter()
        self._warned = False
        self._began = self._said = time.monotonic()

    def cell(self, cell: Cell) -> None:
        """Count a cell that is done."""
        self._done.add(cell)
        self._show(cell)

    def examples(self, cell: Cell, number: int, seconds: float) -> None:
        """Count `number` examples of a cell, which took `seconds`."""
        self._tried[cell] += number
        self._seconds[cell.subject.spec] += seconds
        self._examples[cell.subject.spec] += number
        if cell.subject.defaults.slow and not self._warned:
            self._warn(cell, seconds / number)
        self._show(cell)

    def _show(self, cell: Cell) -> None:
        told = self._told(cell)
        self._line.describe(f"{_shown(cell, max(12, self._line.width - len(told) - 2))}: {told}")
        if self._say and not self._line.width and time.monotonic() - self._said > _SAY_AGAIN:
            self._tell(f"{_shown(cell, _NAME)}: {told}")

    def _told(self, cell: Cell) -> str:
        """Return `example 57/200, 12 s, 3 of 8 cells, about 2 min left`."""
        tried, spent, left = self._tried[cell], time.monotonic() - self._began, self._left()
        parts = [f"example {tried}/{max(tried, self._examples_of(cell))}", _lasting(spent)]
        parts.append(f"{len(self._done)} of {len(self._cells)} cells")
        return ", ".join([*parts, f"about {_lasting(left)} left"] if left and spent > _KNOWS_AFTER else parts)

    def _left(self) -> float:
        """Return about how many seconds are left, by what an example of each loader took so far; 0: nobody knows."""
        busy, tried = sum(self._seconds.values()), sum(self._examples.values())
        if not busy:
            return 0.0
        waiting = [cell for cell in self._cells if cell not in self._done]
        alone = sum(self._remaining(cell) * self._rate(cell, busy / tried) for cell in waiting)
        workers = min(self._workers, len(waiting)) or 1
        spent = (time.monotonic() - self._began) * min(self._workers, len(self._cells))
        return alone * max(1.0, spent / busy) / workers  # judging an example takes time too

    def _remaining(self, cell: Cell) -> int:
        return max(0, self._examples_of(cell) - self._tried[cell])

    def _examples_of(self, cell: Cell) -> int:
        if cell not in self._expected:
            self._expected[cell] = self._plan.loads_in(cell)
        return self._expected[cell]

    def _rate(self, cell: Cell, otherwise: float) -> float:
        spec = cell.subject.spec
        return self._seconds[spec] / self._examples[spec] if self._examples[spec] else otherwise

    def _warn(self, cell: Cell, seconds: float) -> None:
        """Say after the first load of a slow loader how long its cells will take."""
        self._warned = True
        cells = [each for each in self._cells if each.subject == cell.subject]
        expected = self._examples_of(cell)
        whole = sum(self._examples_of(each) for each in cells) * seconds / min(self._workers, len(cells))
        if whole < _WORTH_SAYING:
            return
        more = f", {_lasting(whole)} for its {len(cells)} cells" if len(cells) > 1 else ""
        self._tell(
            f"{cell.subject.title}: the first load took {seconds:.1f} s; a cell takes about {expected} loads, so "
            f"{_lasting(expected * seconds)}{more} (fewer with --max-examples, --format and --bench)"
        )

    def _tell(self, text: str) -> None:
        self._said = time.monotonic()
        if self._say:
            self._say(text)


def _shown(cell: Cell, width: int) -> str:
    """Return the cell within `width`: of a long loader's name the middle goes first."""
    place = f" {cell.format} {cell.bench_name} {cell.variant_name}"
    return elided(elided(printable(cell.subject.title), max(10, width - len(place))) + place, width)


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
