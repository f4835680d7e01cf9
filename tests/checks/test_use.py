"""`check` prints a strength only where what was measured of the counterexample agrees with it."""

from __future__ import annotations

from types import SimpleNamespace as Stub
from typing import Any

import pytest

from harness.checks.describe import NamedFinding
from harness.example import Example, Target
from harness.law.grammar import ALPHA, RANK, STRENGTH, word_of
from harness.law.law import Law

IGNORES = Law(word_of(STRENGTH, 1.0), word_of(ALPHA, 0.0), word_of(RANK, 0.0))


def named(scales: list[float], expected: list[float], *, strength: float = 1.0, right: bool = True) -> NamedFinding:
    targets = tuple(Target(f"m{index}", 4, 4 * scale / strength) for index, scale in enumerate(expected))
    fits = {
        target.name: (Stub(scale=scale, expected=wanted, finite=True, direction_right=right),)
        for target, scale, wanted in zip(targets, scales, expected, strict=True)
    }
    observation: Any = Stub(example=Example(targets, strength=strength), fits=fits)
    finding: Any = Stub(code="LH209", check="", family="scale", observation=observation)
    diagnosis: Any = Stub(law=IGNORES, code="LH202", family="scale", trait=None)
    return NamedFinding(Stub(subject=Stub(strength_argument="strength")), finding, diagnosis)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scales", "expected", "use"),
    [
        ([1.0], [0.5], 0.5),  # the law, and the measurement agrees
        ([2.0], [1.5], 0.75),  # the law says 1.5, which would be twice too strong here
        ([1.0, 1.0], [0.5, 0.25], None),
        ([2.0, 4.0], [1.0, 2.0], 0.5),
    ],
)
def test_the_strength_is_the_one_that_the_counterexample_needs(
    scales: list[float], expected: list[float], use: float | None
) -> None:
    assert named(scales, expected).use == use


def test_a_counterexample_at_another_strength_is_scaled_back() -> None:
    assert named([2.0], [1.0], strength=2.0).use == 0.5


def test_no_number_is_given_where_the_direction_is_wrong() -> None:
    assert named([1.0], [0.5], right=False).use is None


def test_a_counterexample_at_strength_zero_leaves_it_to_the_law() -> None:
    found = named([1.0], [0.5])
    example = Example(found.example.targets, strength=0.0)
    found.finding.observation.example = example  # type: ignore[misc]
    assert found.use == 0.5
