"""The committed table of laws behind the prescriptions is what the harness measures today."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.checks.cell import Cell
from harness.checks.law import measure_law
from harness.checks.strength_table import strength_table
from harness.law.known import known_laws
from harness.loaders.registry import installed, resolve

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "raw_alpha.py") + ":load"
SPECS = {"raw alpha": EXAMPLE}
AVAILABLE = {each.name for each in installed() if each.available}


@pytest.mark.parametrize("name", known_laws())
def test_the_table_has_the_law_that_is_measured(name: str) -> None:
    if name not in AVAILABLE | set(SPECS):
        pytest.skip(f"{name} is not installed here")
    row, law = known_laws()[name], measure_law(SPECS.get(name, name)).diagnosis.law
    assert law is not None
    assert law.exponents == row.law.exponents
    assert law.constant == row.law.constant
    assert not law.ambiguous


def founding(rank: int, alpha: float, *strengths: float) -> list[tuple[float, str]]:
    cell = Cell(resolve("diffsynth-2.0.4"), "diffsynth", "qwen-image-fused")
    return [
        (round(row.factor, 4), row.word) for row in strength_table(cell, rank=rank, alpha=alpha, strengths=strengths)
    ]


@pytest.mark.skipif("diffsynth-2.0.4" not in AVAILABLE, reason="diffsynth-2.0.4 is not installed here")
def test_the_founding_table_with_the_real_old_loader() -> None:
    too_strong = "too strong: artifacts expected"
    assert founding(32, 32.0, 1, 4, 32) == [(1, "as trained"), (4, too_strong), (32, "noise expected")]
    assert founding(32, 16.0, 0.5, 1.0) == [(1, "as trained"), (2, too_strong)]
