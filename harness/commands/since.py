"""Cells of a run that need not be measured again, and the note that lets a later run carry others over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.checks.plan import Plan
    from harness.isolation.limits import Limits
    from harness.report.records import Run, RunWriter

Place = tuple[str, str, str, str]


def earlier_run(path: Path | None) -> Run | None:
    """Return the run whose verdicts may be carried over, read before anything is written.

    Raises:
        UserError: it cannot be read.
    """
    from harness.report.records import read_run

    return None if path is None else read_run(path)


def fingerprints(cells: Sequence[Cell], plan: Plan, limits: Limits) -> dict[Place, str | None]:
    """Return what the verdicts of each cell depend on, None where that is not known."""
    from harness.checks.fingerprint import fingerprint

    return {_place(cell): fingerprint(cell, plan, limits) for cell in cells}


def carry_over(
    writer: RunWriter, since: Run | None, cells: Sequence[Cell], prints: Mapping[Place, str | None], *, quiet: bool
) -> list[Cell]:
    """Write what an earlier run says of the cells in which nothing has changed; return the others."""
    from harness.checks.family import family_names
    from harness.report.since import Earlier

    if since is None:
        return list(cells)
    kept = Earlier(since, frozenset({*family_names(), "known_failures"})).still_holds(prints)
    for records in kept.values():
        writer.write(*records)
    if not quiet:
        click.echo(f"carried over from run {since.header.run_id}: {len(kept)} of {len(cells)} cells", err=True)
    return [cell for cell in cells if _place(cell) not in kept]


def note(writer: RunWriter, cell: Cell, prints: Mapping[Place, str | None]) -> None:
    """Write that a cell was judged to its end, and what its verdicts depend on."""
    from harness.report.models import CellRecord

    loader, form, bench, variant = place = _place(cell)
    writer.write(CellRecord(loader=loader, format=form, bench=bench, variant=variant, fingerprint=prints[place]))


def _place(cell: Cell) -> Place:
    return cell.subject.title, cell.format, cell.bench_name, cell.variant_name
