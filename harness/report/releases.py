"""What each release of a loader does: a table to print, a page, JSON, and lines for the history."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.checks.releases import CellLaw, ReleaseChange, ReleaseLaw, changes
from harness.law.released import NO_MODEL, NOT_JUDGED, RAISES, table_of
from harness.outputs import replace_file, saying
from harness.report.environment import installed_versions
from harness.report.history import HistoryCell, HistoryRecord
from harness.report.html import asset, environment, policy
from harness.report.kept_releases import TABLES, release_from
from harness.report.summary import SYMBOLS, pretty_formula
from harness.text import count, on_one_line


@dataclass(frozen=True)
class ReleaseTable:
    """The releases of a loader that were measured, oldest first; of `among` releases, where only some had to be.

    `package` is what its releases are called in the index.
    """

    loader: str
    package: str
    releases: tuple[ReleaseLaw, ...]
    among: int = 0
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @cached_property
    def places(self) -> list[str]:
        """The cells, `format/bench`, in the order measured."""
        return list(dict.fromkeys(place for release in self.releases for place in release.states))

    @cached_property
    def changes(self) -> list[ReleaseChange]:
        """Where a release does something else than the one before."""
        return changes(self.releases)

    @property
    def problems(self) -> list[ReleaseLaw]:
        """The releases that could not be measured, or not in all cells."""
        return [release for release in self.releases if release.problem]

    @property
    def seconds(self) -> float:
        """Seconds per release, in the mean of those that were measured."""
        measured = [release.seconds for release in self.releases if release.cells]
        return sum(measured) / len(measured) if measured else 0.0

    @property
    def headline(self) -> str:
        """What there is to say in one sentence."""
        if not any(release.cells for release in self.releases):
            return f"No release of {self.loader} could be measured."
        if self.changes:
            first = self.changes[-1]
            more = f", and {count(len(self.changes) - 1, 'more change')}" if len(self.changes) > 1 else ""
            before, after = pretty_formula(first.before), pretty_formula(first.after)
            return f"{self.loader} {first.first} changed {first.place}: {before} → {after}{more}."
        return f"No release of {self.loader} that was measured changed what another does."

    def cell(self, release: ReleaseLaw, place: str) -> CellLaw | None:
        """Return what a release does in a place, None where that was not measured."""
        return next((cell for cell in release.cells if cell.place == place), None)

    def is_new(self, release: ReleaseLaw, place: str) -> bool:
        """Whether a release was the first to do what it does there."""
        return any(change.first == release.version and change.place == place for change in self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return {
            "kind": "releases",
            "loader": self.loader,
            "package": self.package,
            "created": self.created,
            "among": self.among or len(self.releases),
            "versions": installed_versions(),
            "releases": [asdict(release) for release in self.releases],
            "changes": [asdict(change) for change in self.changes],
        }


def committed(loader: str) -> ReleaseTable | None:
    """Return the table of a loader's releases that comes with the harness, None where there is none."""
    found = table_of(loader)
    if found is None:
        return None
    releases = tuple(map(release_from, found["releases"]))
    return ReleaseTable(loader, found["package"], releases, created=found["created"])


def look(cell: CellLaw) -> str:
    """Return how a page shows a cell: `passed`, `xfailed` (right, raises on some), `failed`, `errored`, `skipped`."""
    if cell.right:
        return "xfailed" if cell.what else "passed"
    if cell.state in (NO_MODEL, *NOT_JUDGED):
        return "skipped"
    return "errored" if cell.state == RAISES else "failed"


def lines(table: ReleaseTable) -> Iterator[str]:
    """Yield the table as it is printed: for each place, what which releases do."""
    for place in table.places:
        yield f"{table.loader}: {place}"
        yield from _of_place(table, place)
    for release in table.problems:
        yield on_one_line(f"{table.package} {release.version}: {release.problem}")
    if table.among > len(table.releases):
        yield f"{len(table.releases)} of {table.among} releases measured; between those that agree nothing was tried"
    yield table.headline


def _of_place(table: ReleaseTable, place: str) -> Iterator[str]:
    found = [(release, cell) for release in table.releases if (cell := table.cell(release, place))]
    for _, group in groupby(found, key=lambda pair: pair[1].state):
        (first, cell), *more = group
        span = f"{first.version} – {more[-1][0].version}" if more else first.version
        code = f"  {cell.code}" if cell.code else ""
        why = f" ({cell.why})" if cell.why else ""
        day = f"{first.day}  " if first.day else ""
        shown = f"  {span:<20} {day}{SYMBOLS[look(cell)]} {pretty_formula(cell.state)}{code}{why}"
        yield on_one_line(shown, 220)


def write_tables(tables: Sequence[ReleaseTable], out: Path) -> Path:
    """Write `out`/index.html and `out`/releases.json; return the page.

    Raises:
        UserError: `out` cannot be written.
    """
    with saying(out, "the tables cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps([table.as_dict() for table in tables], indent=1) + "\n"
        replace_file(out / TABLES, text.encode("utf-8"))
        replace_file(out / "index.html", render(tables).encode("utf-8"))
    return out / "index.html"


def render(tables: Sequence[ReleaseTable]) -> str:
    """Return the page of some tables as HTML text."""
    style, script = asset("report.css"), asset("report.js")
    return (
        environment()
        .get_template("releases.html.j2")
        .render(tables=tables, look=look, policy=policy(script, style), style=style, script=script)
    )


def history_records(table: ReleaseTable) -> list[HistoryRecord]:
    """Return one record of the history per release that was measured.

    A release that is measured again and does the same has the same id: it is in the history once.
    """
    return [_record(table, release) for release in table.releases if release.cells]


def _record(table: ReleaseTable, release: ReleaseLaw) -> HistoryRecord:
    digest = hashlib.sha256(json.dumps(release.states, sort_keys=True).encode()).hexdigest()[:8]
    outcomes = [look(cell) for cell in release.cells]
    return HistoryRecord(
        run_id=f"release-{table.loader}-{release.version}-{digest}",
        created=table.created,
        status="failed" if set(outcomes) != {"passed"} else "passed",
        release=release.version,
        versions=installed_versions(),
        counts={name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
        seconds=release.seconds,
        cells=tuple(_key_numbers(table, release, cell) for cell in release.cells),
    )


def _key_numbers(table: ReleaseTable, release: ReleaseLaw, cell: CellLaw) -> HistoryCell:
    return HistoryCell(
        loader=table.loader,
        version=release.version,
        format=cell.format,
        bench=cell.bench,
        outcome=look(cell),
        code=cell.code,
        law=cell.state,
    )
