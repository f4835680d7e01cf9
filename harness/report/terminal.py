"""Print to a terminal: a run as failures folded by cause, the matrix and one sentence; a LoRA file as its facts."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report.models import Footer, Header
from harness.report.records import Run, counts_of, exit_code_of
from harness.report.summary import (
    SYMBOLS,
    WORDS,
    Cause,
    MatrixCell,
    causes,
    cells,
    matrix_columns,
    matrix_rows,
    not_measured,
    sentence,
)
from harness.text import on_one_line
from harness.verdict.verdict import Verdict

STYLES = {
    "failed": "bold red",
    "errored": "bold magenta",
    "refused": "magenta",
    "xpassed": "yellow",
    "xfailed": "cyan",
    "passed": "green",
}
_LABELS = 10
_WIDEST = 40


def print_verdicts(verdicts: Iterable[Verdict], console: Console | None = None, *, reference: str = "") -> None:
    """Print the failures, the matrix, the reference and the summary sentence of verdicts that belong to one run."""
    told = tuple(verdicts)
    counts = counts_of(told)
    footer = Footer(counts=counts, seconds=0.0, exit_code=exit_code_of(counts), reference=reference)
    print_run(Run(Header(run_id="", created="", command=""), told, footer), console)


def print_run(run: Run, console: Console | None = None) -> None:
    """Print a whole run; colours follow the console, so NO_COLOR is honoured and hostile text stays text."""
    console = console or Console()
    for cause in causes(run.verdicts):
        print_cause(cause, console)
    if any(verdict.format for verdict in run.verdicts):
        console.print(matrix_table(run))
    for part in not_measured(run):
        what = on_one_line(f"– {part.name} not measured: {part.reason}")
        console.print(Text(what, style="dim"), soft_wrap=True)
    if run.footer and run.footer.reference:
        console.print(Text(f"reference: {on_one_line(run.footer.reference)}", style="dim"), soft_wrap=True)
    console.print(Text(sentence(run), style="bold"), soft_wrap=True)


def print_cause(cause: Cause, console: Console) -> None:
    """Print one cause as its worst verdict's text, and where else it was seen."""
    head, _, rows = cause.worst.text().partition("\n")
    console.print(Text(head, style=STYLES.get(cause.worst.outcome, "")), soft_wrap=True)
    if rows:
        console.print(Text(rows), soft_wrap=True)
    if also := cause.also():
        width = max((len(label) for label, _ in cause.worst.rows), default=_LABELS)
        console.print(Text(f"  {'also':<{width}}  {also}"), soft_wrap=True)
    console.print()


def matrix_table(run: Run) -> Table:
    """Return the matrix loader x format as a table: a row per loader and bench, the measured law in each cell."""
    grid = cells(run)
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    rows = matrix_rows(grid)
    widest = max((len(row.bench) + 2 for row in rows), default=0)
    table.add_column("", overflow="fold", min_width=min(widest, _WIDEST))
    for name in matrix_columns(grid):
        table.add_column(Text(on_one_line(name)), overflow="fold")
    above: tuple[str, str] = ("", "")
    for row in rows:
        name, place = row.name, (row.loader, row.bench)
        if row.loader != above[0]:
            table.add_row(Text(on_one_line(row.loader), style="bold"))
        if row.variant != "lora":
            if place != above:
                table.add_row(Text(f"  {on_one_line(row.bench)}"))
            name = f"  {name.removeprefix(f'{row.bench} · ')}"
        table.add_row(Text(f"  {on_one_line(name)}"), *map(_cell, row.cells))
        above = place
    return table


def _cell(cell: MatrixCell | None) -> Text:
    if cell is None:
        return Text(SYMBOLS["none"], style="dim")
    law = f"\n{cell.formula}" if cell.formula and cell.outcome != "passed" else ""
    return Text(f"{SYMBOLS[cell.outcome]} {WORDS[cell.outcome]}{law}", style=STYLES.get(cell.outcome, "dim"))
