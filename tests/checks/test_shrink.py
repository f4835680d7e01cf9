"""Plainer numbers are tried one by one, where Hypothesis's small steps lead nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.checks.search import simplified
from harness.example import Example, Target


def start(*shapes: tuple[int, float | None]) -> Example:
    return Example(tuple(Target(f"m{i}", rank, alpha) for i, (rank, alpha) in enumerate(shapes)))


def shapes(example: Example) -> list[tuple[int, float | None]]:
    return [(target.rank, target.alpha) for target in example.targets]


Fails = Callable[[Example], bool]


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda e: True, [(2, 1.0)]),
        (lambda e: any(t.rank % 3 == 0 for t in e.targets), [(3, 1.0)]),
        (lambda e: any(t.rank > 40 for t in e.targets), [(48, 1.0)]),
        (lambda e: any(t.alpha != int(t.alpha or 0) for t in e.targets), [(2, 0.5)]),
        (lambda e: any((t.alpha or 0) > t.rank for t in e.targets), [(2, 3.0)]),
        (lambda e: any((t.alpha or 0) < 0 for t in e.targets), [(2, -1.0)]),
        (lambda e: len({t.alpha for t in e.targets}) > 1, [(2, 2.0), (2, 1.0)]),
        (lambda e: len({t.rank for t in e.targets}) > 1, [(1, 1.0), (2, 1.0)]),
    ],
)
def test_the_plainest_example_that_fails_remains(fails: Fails, expected: list[tuple[int, float]]) -> None:
    found = simplified(start((48, 10.375), (63, -7.25)), fails)
    assert fails(found)
    assert sorted(shapes(found)) == sorted(expected)


def test_a_module_without_alpha_stays_without() -> None:
    assert shapes(simplified(start((48, None)), lambda e: True)) == [(2, None)]


def test_an_example_that_nothing_plainer_replaces_is_kept() -> None:
    only = start((33, 5.5), (7, 2.0))
    assert simplified(only, lambda e: e == only) is only
