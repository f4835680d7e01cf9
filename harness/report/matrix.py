"""The matrix as a page and a terminal show it: a row per loader, a glyph and a letter per cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.report.summary import WORDS, CellKey, MatrixCell, short_title
from harness.text import on_one_line
from harness.verdict.verdict import LawRecord

LETTERS = {
    "failed": "W",
    "errored": "C",
    "refused": "N",
    "xpassed": "F",
    "xfailed": "K",
    "passed": "R",
}
PICTURES = "pictures"


def as_trained(law: LawRecord | None) -> bool:
    """Tell whether a law is the one that the file was trained with."""
    return law is not None and law.name == "as trained"


def law_shown(cell: MatrixCell) -> str:
    """Return the law or factor of a cell where it says something: where it is not the one that was trained with."""
    return "" if as_trained(cell.law) or not cell.formula else cell.formula


def said(cell: MatrixCell) -> str:
    """Return a cell in words: outcome, code and title of what decides it, and the law."""
    if cell.outcome == "passed" or cell.worst is None:
        law = f", {cell.formula}" if cell.formula else ""
        return f"{WORDS[cell.outcome]}{law}"
    law = f", law {law_shown(cell)}" if law_shown(cell) else ""
    return f"{WORDS[cell.outcome]}: {short_title(cell.worst)}{law}"


@dataclass(frozen=True)
class Line:
    """One loader: `places` has a column per bench, its cells by format; `skipped` cells were not measured."""

    loader: str
    formats: tuple[str, ...]
    places: tuple[tuple[str, tuple[tuple[str, tuple[MatrixCell, ...]], ...]], ...]
    skipped: int

    @property
    def cells(self) -> list[MatrixCell]:
        """The measured cells, from left to right."""
        return [cell for _, groups in self.places for _, some in groups for cell in some]


def columns(grid: Mapping[CellKey, MatrixCell]) -> list[str]:
    """Return the benches that were measured, pictures last."""
    found = dict.fromkeys(map(column, _measured(grid.values())))
    return [*(name for name in found if name != PICTURES), *(name for name in found if name == PICTURES)]


def column(cell: MatrixCell) -> str:
    """Return the column that a cell stands in: its bench, or `pictures` where only pictures spoke."""
    return PICTURES if all(v.check == "images" for v in cell.verdicts) else cell.bench or cell.format


def lines(grid: Mapping[CellKey, MatrixCell]) -> list[Line]:
    """Return one line per loader, in the order in which they came."""
    names = columns(grid)
    by_loader: dict[str, list[MatrixCell]] = {}
    for cell in grid.values():
        by_loader.setdefault(cell.loader, []).append(cell)
    return [_line(loader, cells, names) for loader, cells in by_loader.items()]


def _line(loader: str, cells: list[MatrixCell], names: list[str]) -> Line:
    measured = _measured(cells)
    formats = tuple(dict.fromkeys(cell.format for cell in measured))
    places = tuple((name, _groups([cell for cell in measured if column(cell) == name])) for name in names)
    return Line(loader, formats, places, len(cells) - len(measured))


def _groups(cells: list[MatrixCell]) -> tuple[tuple[str, tuple[MatrixCell, ...]], ...]:
    formats = dict.fromkeys(cell.format for cell in cells)
    plain_first = sorted(cells, key=lambda cell: (cell.variant != "lora", cell.variant))
    return tuple((name, tuple(cell for cell in plain_first if cell.format == name)) for name in formats)


def _measured(cells: Iterable[MatrixCell]) -> list[MatrixCell]:
    return [cell for cell in cells if cell.outcome in LETTERS]


def place_of(cell: MatrixCell) -> str:
    """Return format and variant of a cell, in words."""
    return on_one_line(" ".join((cell.format, cell.variant)))
