"""The last runs of a history as the report shows them: bars per night, and what flipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.report.history import Flip, HistoryRecord, flips, trend_rows
from harness.report.summary import OUTCOMES

_LAST = 30
_MOST_FLIPS = 20
_HEIGHT = 48.0


@dataclass(frozen=True)
class Part:
    """One outcome's share of a bar: `top` and `height` in units of the drawing."""

    outcome: str
    count: int
    top: float
    height: float


@dataclass(frozen=True)
class Bar:
    """One run: its outcomes stacked, violations at the foot where they line up from night to night."""

    record: HistoryRecord
    parts: tuple[Part, ...]

    @property
    def violations(self) -> int:
        """Failed, errored and unexpectedly passing checks together."""
        return sum(self.record.counts.get(outcome, 0) for outcome in ("failed", "errored", "xpassed"))


class Trend:
    """The bars and flips of a history; empty with fewer than two runs."""

    height = _HEIGHT

    def __init__(self, history: Sequence[HistoryRecord]) -> None:
        self.history = history

    @cached_property
    def bars(self) -> list[Bar]:
        """The last runs, oldest first, scaled to the largest of them."""
        records = trend_rows(self.history, _LAST)
        most = max((sum(record.counts.values()) for record in records), default=0) or 1
        return [Bar(record, _parts(record, most)) for record in records] if len(records) > 1 else []

    @cached_property
    def flips(self) -> list[Flip]:
        """What changed between runs, the newest first."""
        return flips(self.history)[:_MOST_FLIPS]


def _parts(record: HistoryRecord, most: int) -> tuple[Part, ...]:
    parts, foot = [], _HEIGHT
    room = _HEIGHT - sum(bool(count) for count in record.counts.values())
    for outcome in OUTCOMES:
        if count := record.counts.get(outcome, 0):
            height = 1.0 + count / most * room
            foot -= height
            parts.append(Part(outcome, count, round(foot, 2), round(height, 2)))
    return tuple(parts)
