"""The fixture loaders as cases: which file, which function, what is wrong with it, in which cells to try it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.checks.cell import Cell, declared_cells
from harness.fixtures import fixtures_folder
from harness.loaders.registry import resolve
from harness.loaders.source import import_callable
from harness.selftest.fault import Fault, fault_of

BROKEN, CORRECT = "broken_loaders", "correct_loaders"
_ASSIGNED = re.compile(r"^(?:def )?([a-z]\w*)(?:\(| = )", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """One fixture loader: `name` is `family:function` of a broken one, the file's name of a correct one."""

    name: str
    spec: str
    fault: Fault | None = None

    def cells(self, formats: tuple[str, ...] = (), benches: tuple[str, ...] = ()) -> list[Cell]:
        """Return the cells to try it in: a broken loader where its fault shows, a correct one in all it declares.

        `formats` and `benches` narrow those of a correct loader, where it declares any of them.
        """
        subject = resolve(self.spec)
        if self.fault is not None:
            return [Cell(subject, self.fault.format, self.fault.bench, self.fault.variant)]
        cells = declared_cells(subject)
        cells = [cell for cell in cells if cell.format in formats] or cells
        return [cell for cell in cells if cell.bench_name in benches] or cells


def broken_cases(folder: Path | None = None) -> list[Case]:
    """Return every loader of `fixtures/broken_loaders/` that declares a fault, by file, then in the file's order."""
    folder = folder or fixtures_folder() / BROKEN
    return [case for path in sorted(folder.glob("*.py")) for case in _broken_in(path)]


def correct_cases(folder: Path | None = None) -> list[Case]:
    """Return every loader of `fixtures/correct_loaders/`, one `load` a file."""
    folder = folder or fixtures_folder() / CORRECT
    return [Case(path.stem, f"{path}:load") for path in sorted(folder.glob("*.py"))]


def _broken_in(path: Path) -> Iterator[Case]:
    for name in dict.fromkeys(_ASSIGNED.findall(path.read_text(encoding="utf-8"))):
        fault = fault_of(import_callable(f"{path}:{name}"))
        if fault is not None:
            yield Case(f"{path.stem}:{name}", f"{path}:{name}", fault)
