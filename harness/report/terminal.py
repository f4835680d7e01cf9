"""Print to a terminal: a run as failures folded by cause, the matrix and one sentence; a LoRA file as its facts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report.models import Footer, Header
from harness.report.records import Run, exit_code_of
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
from harness.text import plain, printable
from harness.verdict.blocks import by_block
from harness.verdict.codes import CODES
from harness.verdict.file_record import FileRecord, ModuleEnergy
from harness.verdict.verdict import Verdict

STYLES = {"failed": "bold red", "errored": "bold magenta", "xpassed": "yellow", "xfailed": "cyan", "passed": "green"}
_LABELS = 10
_WIDEST = 40
_ENERGIES_SHOWN = 3
_BLOCKS_SHOWN = 16
_WIDTH = 180  # of what is piped into a file


def print_verdicts(verdicts: Iterable[Verdict], console: Console | None = None) -> None:
    """Print the failures, the matrix and the summary sentence of verdicts that belong to one run."""
    print_run(_run_of(list(verdicts)), console)


def print_run(run: Run, console: Console | None = None) -> None:
    """Print a whole run; colours follow the console, so NO_COLOR is honoured and hostile text stays text."""
    console = console or Console()
    for cause in causes(run.verdicts):
        print_cause(cause, console)
    if any(verdict.format for verdict in run.verdicts):
        console.print(matrix_table(run))
    for part in not_measured(run):
        console.print(Text(f"– {plain(part.name)} not measured: {plain(part.reason)}", style="dim"), soft_wrap=True)
    console.print(Text(sentence(run), style="bold"), soft_wrap=True)


def print_cause(cause: Cause, console: Console) -> None:
    """Print one cause as its worst verdict's text, and where else it was seen."""
    head, _, rows = plain(cause.worst.text()).partition("\n")
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
        table.add_column(Text(plain(name)), overflow="fold")
    above: tuple[str, str] = ("", "")
    for row in rows:
        name, place = row.name, (row.loader, row.bench)
        if row.loader != above[0]:
            table.add_row(Text(plain(row.loader), style="bold"))
        if row.variant != "lora":
            if place != above:
                table.add_row(Text(f"  {plain(row.bench)}"))
            name = f"  {name.removeprefix(f'{row.bench} · ')}"
        table.add_row(Text(f"  {plain(name)}"), *map(_cell, row.cells))
        above = place
    return table


def _cell(cell: MatrixCell | None) -> Text:
    if cell is None:
        return Text(SYMBOLS["none"], style="dim")
    law = f"\n{cell.formula}" if cell.formula and cell.outcome != "passed" else ""
    return Text(f"{SYMBOLS[cell.outcome]} {WORDS[cell.outcome]}{law}", style=STYLES.get(cell.outcome, "dim"))


def _run_of(verdicts: Sequence[Verdict]) -> Run:
    counts = dict(Counter(str(verdict.outcome) for verdict in verdicts))
    footer = Footer(counts=counts, seconds=0.0, exit_code=exit_code_of(counts))
    return Run(Header(run_id="", created="", command=""), tuple(verdicts), footer)


def print_file(record: FileRecord) -> None:
    """Print what is in a LoRA file: facts, hazards, advice, strengths to pass, energies by block."""
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(Text(printable(record.path, 500), style="bold"))
    if record.format is not None:
        console.print(_facts(record))
    for hazard in record.hazards:
        head = f"{hazard.code} {CODES[hazard.code].title}: "
        console.print(Text("  ").append(head, style="yellow").append(printable(hazard.what, 400)))
    if record.advice:
        console.print(Text(f"  {record.advice.outlook}: {printable(record.advice.reason, 400)}", style="bold"))
        for line in record.advice.advice:
            console.print(Text(f"    - {printable(line, 400)}"))
    if record.prescription and record.modules:
        console.print(_prescriptions(record))
    if record.energies:
        console.print(_blocks(record.energies))


def _facts(record: FileRecord) -> Table:
    table = Table.grid(padding=(0, 2))
    numbers = [
        ("modules", f"{record.modules} ({_counts(record.variants)}; {_counts(record.dtypes)})"),
        ("rank", _counts(record.ranks)),
        ("alpha", _counts(record.alphas)),
    ]
    rows = [
        ("format", f"{record.format}; alpha from {record.alpha_source}"),
        *(numbers if record.modules else [("modules", "none that can be read")]),
        *((f"scale {name}", _range(*span)) for name, span in record.scales.items()),
        ("understood", "-" if record.coverage is None else f"{record.coverage:.0%} of the keys"),
        *((("trainer", record.trainer),) if record.trainer else ()),
        *((("energy", _energies(record)),) if record.energy else ()),
        *(("note", note) for note in record.notes),
    ]
    for label, value in rows:
        table.add_row(Text(f"  {label}"), Text(printable(value, 400)))
    return table


def _prescriptions(record: FileRecord) -> Table:
    table = Table.grid(padding=(0, 2))
    for loader, strength in record.prescription.items():
        use = "no single strength, or the file does not say enough" if strength is None else f"strength {strength:g}"
        table.add_row(Text("  pass"), Text(printable(loader, 120)), Text(use))
    return table


def _blocks(energies: Mapping[str, ModuleEnergy]) -> Table:
    """Return the energies by block; of many blocks those with the largest, in the order of the model."""
    blocks = by_block(energies)
    strongest = sorted(blocks, key=lambda block: -(block.energy or 0.0))[:_BLOCKS_SHOWN]
    what = "||ΔW|| / ||W||" if any(block.relative is not None for block in blocks) else "||ΔW||"
    table = Table(box=None, pad_edge=False, padding=(0, 2), caption_justify="left")
    table.add_column("  block", overflow="fold")
    for column in ("modules", what, "largest σ", "effective rank"):
        table.add_column(column, justify="right")
    for block in (block for block in blocks if block in strongest):
        energy = "-" if block.energy is None else f"{block.energy:.3g}"
        cells = (f"{block.modules}", energy, f"{block.spectral:.3g}", f"{block.effective_rank:.3g}")
        table.add_row(Text(f"  {printable(block.name, 80)}"), *cells)
    if len(blocks) > len(strongest):
        table.caption = f"  and {len(blocks) - len(strongest)} weaker blocks (all of them with --html)"
    return table


def _energies(record: FileRecord) -> str:
    """Return the largest energies by module, in words short enough for a terminal."""
    found = sorted((record.energy or {}).items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {value:.3g}" for name, value in found[:_ENERGIES_SHOWN])
    return shown + (f" and {len(found) - _ENERGIES_SHOWN} more" if len(found) > _ENERGIES_SHOWN else "")


def _counts(values: dict[str, int]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({times}x)" for value, times in list(values.items())[:8])


def _range(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
