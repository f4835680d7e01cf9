"""The first sure answer of each loader, printed while the check goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from harness.text import on_one_line

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.verdict.verdict import Verdict

_ROWS = ("loader", "file", "lora", "law", "use")


class FirstAnswers:
    """Prints the first sure answer of each loader as it comes; seconds count from when this was made."""

    def __init__(self, *, stops: bool) -> None:
        self._stops, self._began = stops, time.monotonic()
        self._told: dict[str, Verdict] = {}

    def tell(self, verdict: Verdict) -> None:
        """Print a verdict that is sure, unless its loader has had one."""
        if verdict.loader in self._told:
            return
        self._told[verdict.loader] = verdict
        rows = tuple(row for row in verdict.rows if row[0] in _ROWS)
        rest = "it stops there (-x)" if self._stops else "the check goes on (-x: stop there)"
        rows += (("sure", f"after {verdict.examples} files, {time.monotonic() - self._began:.1f} s; {rest}"),)
        click.echo(f"{verdict.model_copy(update={'rows': rows}).text()}\n")

    def taken_back(self, verdicts: Iterable[Verdict]) -> Iterator[str]:
        """Yield a sentence for each answer that the whole check of its cell gives otherwise, or does not give."""
        found: dict[tuple[str | None, ...], list[str]] = {}
        for verdict in verdicts:
            found.setdefault((*_place(verdict), verdict.code), []).append(_law(verdict))
        for early in self._told.values():
            laws = found.get((*_place(early), early.code), [])
            if laws and _law(early) not in laws:
                yield on_one_line(f"{early.loader}: made precise: the whole check says {early.code}, {laws[0]}")
            elif not laws:
                what = f"the whole check does not say {early.code}, {_law(early)}"
                yield on_one_line(f"{early.loader}: taken back: {what}")


def _law(verdict: Verdict) -> str:
    return verdict.law.formula if verdict.law else str(verdict.code)


def _place(verdict: Verdict) -> tuple[str | None, ...]:
    return verdict.loader, verdict.format, verdict.bench, verdict.variant


def reached(cells: Sequence[Cell], verdicts: Iterable[Verdict]) -> list[Cell]:
    """Return the cells of which something was measured."""
    judged = {_place(verdict) for verdict in verdicts if verdict.outcome != "skipped"}
    return [c for c in cells if (c.subject.title, c.format, c.bench_name, c.variant_name) in judged]
