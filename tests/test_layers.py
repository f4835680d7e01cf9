"""The floors of the house: a module imports from its own folder or from lower floors, wherever the import stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "harness"
# from the ground up; ARCHITECTURE.md says what each owns
FLOORS = (
    {"errors", "text", "example", "fixtures", "garbage", "serve"},
    {"verdict", "outputs"},
    {"law"},
    {"isolation"},
    {"files"},
    {"benches", "strategies"},
    {"measure", "reference"},
    {"variants"},
    {"loaders"},
    {"checks"},
    {"images"},
    {"report"},
    {"doctor", "selftest"},
    {"commands", "suite"},
    {"cli", "plugin"},
    {"__init__", "__main__"},
)
FLOOR_OF = {unit: height for height, units in enumerate(FLOORS) for unit in units}


def unit_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, unit) of every import of the package, those inside functions and for types included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("harness."))  # type: ignore[attr-defined]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if "_fixtures" not in file.parts)


def test_every_folder_and_module_of_the_package_has_a_floor() -> None:
    assert {unit_of(file) for file in FILES} == set(FLOOR_OF)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_lead_downwards(file: Path) -> None:
    own = unit_of(file)
    upward = [
        f"{file.relative_to(PACKAGE)}:{line} imports {unit}"
        for line, unit in imported(file)
        if unit != own and FLOOR_OF[unit] >= FLOOR_OF[own]
    ]
    assert not upward


def test_the_map_names_every_folder() -> None:
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert [unit for unit in FLOOR_OF if (PACKAGE / unit).is_dir() and f"`{unit}/`" not in text] == []


def test_every_file_on_the_map_exists() -> None:
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    missing = [name for name in named if not (PACKAGE / name).exists() and not (PACKAGE.parent / name).exists()]
    assert len(named) > 30
    assert missing == []
