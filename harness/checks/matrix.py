"""The matrix: which cells, of format, bench and variant, a loader is checked in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from harness.benches import get_bench
from harness.checks.describe import cell_verdict
from harness.checks.trial import Cell
from harness.errors import UserError
from harness.files import FORMATS
from harness.loaders.protocol import Subject
from harness.variants import get_variant
from harness.verdict.verdict import Verdict


def cells_of(
    subject: Subject,
    formats: Sequence[str] | None = None,
    benches: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
) -> tuple[list[Cell], list[Verdict]]:
    """Return the cells to check, and a skipped verdict for each wanted one that the loader does not declare.

    What no file can be, such as a convolution on a model that has none, is no cell at all.

    Raises:
        UserError: an unknown format, bench or variant, or nothing to check.
    """
    _known_names(formats, benches, variants)
    cells, skipped = [], []
    for cell in _product(subject, formats, benches, variants):
        reason = subject.unsupported(cell.format, cell.bench_name, cell.variant_name)
        if reason is None:
            cells.append(cell)
        else:
            skipped.append(cell_verdict(cell, "smoke", "skipped", title="not declared", reason=reason))
    if not cells and not skipped:
        raise UserError(f"{subject.spec}: no file has the format, bench and variant asked for; nothing to check")
    return cells, skipped


def declared_cells(subject: Subject) -> list[Cell]:
    """Return every cell that the loader declares."""
    return [c for c in _product(subject) if subject.unsupported(c.format, c.bench_name, c.variant_name) is None]


def _product(
    subject: Subject,
    formats: Sequence[str] | None = None,
    benches: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
) -> Iterator[Cell]:
    names = formats or subject.formats, benches or subject.benches, variants or subject.variants
    cells = (Cell(subject, *place) for place in itertools.product(*names))
    return (cell for cell in cells if cell.possible)


def checkable_formats() -> tuple[str, ...]:
    """Return the formats that loaders are checked with: those whose every module has a scale of its own, or none."""
    return tuple(f.name for f in FORMATS.values() if f.alpha[0] in ("tensor", "header", "config", "none"))


def _known_names(formats: Sequence[str] | None, benches: Sequence[str] | None, variants: Sequence[str] | None) -> None:
    checkable = checkable_formats()
    for name in formats or ():
        if name not in checkable:
            raise UserError(
                f"format={name!r}: not a format that loaders are checked with; those are {', '.join(checkable)}"
            )
    for name in benches or ():
        get_bench(name)
    for name in variants or ():
        get_variant(name)
