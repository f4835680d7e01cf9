"""Print a run to a terminal: what is known, the matrix as glyphs in 80 columns, then the failures and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report.known import KnownGroup, known_groups
from harness.report.links import code_link
from harness.report.matrix import LETTERS, Line, columns, lines
from harness.report.models import Footer, Header, PartRecord
from harness.report.records import Run, counts_of, exit_code_of
from harness.report.summary import (
    SYMBOLS,
    WORDS,
    FailureGroup,
    MatrixCell,
    causes,
    cells,
    listed,
    not_measured,
    sentence,
    short_title,
)
from harness.text import count, elided, on_one_line
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
_SILENCE = "silence"  # stands where a format does
_WIDTH = 80
_NAME, _GAP, _SHORTEST = 20, 2, 4
_MOST_TOLD, _MOST_BRIEF = 5, 20
_MOST_KNOWN = 10
_MOST_UNMEASURED = 5


def print_verdicts(verdicts: Iterable[Verdict], console: Console | None = None, *, reference: str = "") -> None:
    """Print the failures, the matrix, the reference and the summary sentence of verdicts that belong to one run."""
    told = tuple(verdicts)
    counts = counts_of(told)
    footer = Footer(counts=counts, seconds=0.0, exit_code=exit_code_of(counts), reference=reference)
    print_run(Run(Header(run_id="", created="", command=""), told, footer), console)


def print_run(run: Run, console: Console | None = None) -> None:
    """Print a whole run, the verdict last; colours follow the console, and hostile text stays text."""
    console = console or Console()
    for text in (*_unmeasured(not_measured(run)), *_known(known_groups(run.verdicts))):
        console.print(text, soft_wrap=True)
    if blocks := _blocks(run):
        for block in blocks:
            console.print(_table(block), width=_WIDTH)
        console.print(_legend(run, [name for block in blocks for name in block.heads]), soft_wrap=True)
    if run.footer and run.footer.reference:
        console.print(Text(f"reference: {on_one_line(run.footer.reference)}", style="dim"), soft_wrap=True)
    found = causes(run.verdicts)
    if found:
        console.print()
    for cause in found[:_MOST_TOLD]:
        print_cause(cause, console)
    for text in _brief(found[_MOST_TOLD:]):
        console.print(text, soft_wrap=True)
    console.print(Text(sentence(run), style="bold"), soft_wrap=True)


def print_cause(cause: FailureGroup, console: Console) -> None:
    """Print one cause as its worst verdict's text, where else it was seen, and the page of its code."""
    head, _, rows = cause.worst.text().partition("\n")
    console.print(Text(head, style=STYLES.get(cause.worst.outcome, "")), soft_wrap=True)
    if rows:
        console.print(Text(rows), soft_wrap=True)
    width = max((len(label) for label, _ in cause.worst.rows), default=_LABELS)
    if also := cause.also():
        console.print(Text(f"  {'also':<{width}}  {also}"), soft_wrap=True)
    if page := code_link(cause.worst.code):
        console.print(Text(f"  {'page':<{width}}  {page}"), soft_wrap=True)
    console.print()


def _brief(found: Sequence[FailureGroup]) -> Iterator[Text]:
    """Say the causes that are not told in full in a line each."""
    for cause in found[:_MOST_BRIEF]:
        worst = cause.worst
        places = count(len(cause.verdicts), "verdict")
        what = on_one_line(f"{SYMBOLS[worst.outcome]} {elided(worst.loader, 40)}: {short_title(worst)}, {places}")
        yield Text(what, style=STYLES.get(worst.outcome, ""))
    if len(found) > _MOST_BRIEF:
        yield Text(f"and {count(len(found) - _MOST_BRIEF, 'more cause')}: --json or the report has them all")
    elif found:
        yield Text("these in full: --json, the report, or each loader checked alone", style="dim")


def _unmeasured(parts: Sequence[PartRecord]) -> Iterator[Text]:
    for part in parts[:_MOST_UNMEASURED]:
        yield Text(on_one_line(f"– {part.name} not measured: {part.reason}"), style="dim")
    if len(parts) > _MOST_UNMEASURED:
        yield Text(
            f"– and {count(len(parts) - _MOST_UNMEASURED, 'more reason')} for what was not measured", style="dim"
        )


def _known(groups: Sequence[KnownGroup]) -> Iterator[Text]:
    """Say the known failures in a line per finding."""
    for group in groups[:_MOST_KNOWN]:
        codes, where = ", ".join(group.codes), listed([elided(name, _NAME) for name in group.loaders], 3)
        what = f"{SYMBOLS['xfailed']} {codes} {where}: {group.what}"
        page = f" {group.address or group.page or group.link}".rstrip()
        cells_ = f" ({count(len(group.cells), 'cell')})"
        yield Text(on_one_line(f"{elided(what, 200)}{cells_}{page}"), style=STYLES["xfailed"])
    if len(groups) > _MOST_KNOWN:
        yield Text(f"{SYMBOLS['xfailed']} and {count(len(groups) - _MOST_KNOWN, 'more known finding')}", style="dim")


@dataclass(frozen=True)
class _Block:
    """As many columns of the matrix as fit side by side, and the rows that have a sign in them."""

    heads: list[str]
    rows: list[list[Text]]


def _blocks(run: Run) -> list[_Block]:
    """Return the matrix: a row per loader, a column per bench, a sign per format and variant."""
    grid = cells(run)
    rows = [[Text(elided(line.loader, _NAME), style="bold"), *_glyphs(line)] for line in lines(grid) if line.cells]
    if not rows:
        return []
    names, (first, *widths) = columns(grid), [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        _Block(
            _fitted(names[part], widths[part], _WIDTH - first),
            [[name, *own[part]] for name, *own in rows if any(own[part])],
        )
        for part in _side_by_side(names, widths, _WIDTH - first)
    ]


def _side_by_side(names: Sequence[str], widths: Sequence[int], room: int) -> Iterator[slice]:
    """Yield the columns that fit into `room`: all with shorter heads, else as many at a time as fit with whole ones."""
    if sum(max(_SHORTEST, width) + _GAP for width in widths) <= room:
        yield slice(0, len(names))
        return
    start, used = 0, 0
    for at, (name, width) in enumerate(zip(names, widths, strict=True)):
        needed = max(len(on_one_line(name)), width) + _GAP
        if at > start and used + needed > room:
            yield slice(start, at)
            start, used = at, 0
        used += needed
    yield slice(start, len(names))


def _table(block: _Block) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("", no_wrap=True)
    for name in block.heads:
        table.add_column(Text(name), overflow="fold")
    for row in block.rows:
        table.add_row(*row)
    return table


def _fitted(names: Sequence[str], widths: Sequence[int], room: int) -> list[str]:
    """Return the heads of columns of such `widths`, the longest elided until all fit side by side into `room`."""
    long = [len(on_one_line(name)) for name in names]

    def whole() -> int:
        return sum(map(max, long, widths)) + _GAP * len(long)

    while long and whole() > room and max(long) > _SHORTEST:
        long[long.index(max(long))] -= 1
    return [elided(name, limit) for name, limit in zip(names, long, strict=True)]


def _glyphs(line: Line) -> Iterator[Text]:
    for _, groups in line.places:
        text = Text()
        for order, (_, some) in enumerate(groups):
            text.append(" " if order else "")
            for cell in some:
                text.append(*_glyph(cell))
        yield text


def _glyph(cell: MatrixCell) -> tuple[str, str]:
    return SYMBOLS[cell.outcome], STYLES.get(cell.outcome, "dim")


def _legend(run: Run, shown: Sequence[str]) -> Text:
    grid = cells(run)
    seen = {cell.outcome for cell in grid.values()}
    words = [f"{SYMBOLS[outcome]} {WORDS[outcome]}" for outcome in LETTERS if outcome in seen]
    names = [on_one_line(name) for name in columns(grid)]
    heads = "" if names == shown else f"; columns: {', '.join(names)}"
    last = f", then one for {_SILENCE}" if any(cell.format == _SILENCE for cell in grid.values()) else ""
    return Text(f"{', '.join(words)}; a sign per format and variant{last}{heads}", style="dim")
