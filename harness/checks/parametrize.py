"""`parametrize_with_checks`: the same checks as tests of somebody's own suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from harness.checks.cell import Cell, cells_of
from harness.checks.families.silence import tries_silence
from harness.checks.family import family_names
from harness.checks.known import KnownFailure
from harness.checks.plan import Plan
from harness.checks.run import check_cells
from harness.isolation.limits import Limits
from harness.loaders.registry import resolve
from harness.verdict.verdict import Verdict


class CellTest:
    """One check family in one cell; calling it runs the cell once and raises AssertionError on a violation."""

    def __init__(self, cell: Cell, family: str, run: Callable[[Cell], Sequence[Verdict]]) -> None:
        self.cell, self.family, self._run = cell, family, run

    def __repr__(self) -> str:
        cell = self.cell
        variant = f"-{cell.variant_name}" if cell.variant_name != "lora" else ""
        return f"{cell.subject.title}-{cell.format}-{cell.bench_name}{variant}-{self.family}"

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts of this family; a cell that could not run at all answers for every family."""
        found = list(self._run(self.cell))
        own = [v for v in found if v.check == self.family or (self.family == "smoke" and v.check not in family_names())]
        return own or [v for v in found if not v.ok]

    def __call__(self) -> None:
        """Raise AssertionError with the text of every violation."""
        bad = [verdict for verdict in self.verdicts() if not verdict.ok]
        if bad:
            raise AssertionError("\n\n".join(verdict.text() for verdict in bad))


def cell_tests(
    load: Callable[..., object] | str,
    *,
    formats: Iterable[str] | None = None,
    benches: Iterable[str] | None = None,
    variants: Iterable[str] | None = None,
    plan: Plan = Plan(),
    limits: Limits = Limits(),
) -> list[CellTest]:
    """Return one test per declared cell and check family of a loader; a cell runs once for all its families."""
    cells, _ = cells_of(resolve(load), formats, benches, variants)

    @cache
    def run(cell: Cell) -> tuple[Verdict, ...]:
        return tuple(check_cells([cell], plan, limits))

    return [
        CellTest(cell, family, run)
        for cell in cells
        for family in family_names()
        if family != "silence" or tries_silence(cell)
    ]


def parametrize_with_checks(
    loaders: Iterable[Callable[..., object] | str],
    *,
    formats: Iterable[str] | None = None,
    benches: Iterable[str] | None = None,
    variants: Iterable[str] | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    known_failures: Sequence[KnownFailure] = (),
) -> Any:
    """Decorate a test function with one parameter, `check`, to run every check of every loader as its own test.

    >>> @parametrize_with_checks([my_load])
    ... def test_my_loader(check):
    ...     check()
    """
    import pytest

    plan = Plan(max_examples=max_examples, seed=seed, known=tuple(known_failures))
    tests = [
        t for load in loaders for t in cell_tests(load, formats=formats, benches=benches, variants=variants, plan=plan)
    ]
    return pytest.mark.parametrize("check", tests, ids=repr)
