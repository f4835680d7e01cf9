"""A number that goes through a dtype on its way is named with that dtype, and only where nothing else explains it."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

import pytest

from harness.law.diagnosis import diagnose
from harness.law.grammar import bfloat16
from harness.law.probe import Probe
from harness.law.rounding import float16, rounds

SHAPES = ((33.3, 7), (10.1, 3), (0.7, 12), (8.0, 4), (16.0, 16), (1.001, 5))
STRENGTHS = (1.0, 0.3, -1.7, 0.001)
Scale = Callable[[Probe], float]


def probes(scale: Scale, strengths: tuple[float, ...] = STRENGTHS, **fields: object) -> list[Probe]:
    made = []
    for (alpha, rank), strength in itertools.product(SHAPES, strengths):
        plain = Probe("m", strength, 0, (alpha,), (rank,), 0.0, 1e-6 * abs(strength) * alpha / rank, **fields)  # type: ignore[arg-type]
        made.append(Probe("m", strength, 0, (alpha,), (rank,), scale(plain), plain.tolerance, **fields))  # type: ignore[arg-type]
    return made


FILES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("scale", "code", "text"),
    [
        (lambda p: float16(p.strength) * p.expected / p.strength, "LH207", "float16 rounds the strength"),
        (lambda p: bfloat16(p.strength) * p.expected / p.strength, "LH207", "bfloat16 rounds the strength"),
        (lambda p: float16(p.alpha or 0) * p.strength / p.rank, "LH205", "float16 rounds alpha"),
        (lambda p: bfloat16((p.alpha or 0) / p.rank) * p.strength, "LH209", "bfloat16 rounds alpha / rank"),
        (lambda p: float16(p.expected), "LH209", "float16 rounds strength * alpha / rank"),
    ],
)
def test_a_rounding_is_named_with_its_dtype(scale: Scale, code: str, text: str) -> None:
    found = diagnose([p for file in FILES for p in probes(scale, file_dtype=file)])
    assert (found.code, str(found.trait)) == (code, text)


def test_the_dtype_may_be_the_files() -> None:
    by = {"float32": lambda x: x, "bfloat16": bfloat16, "float16": float16}
    scale: Scale = lambda p: by[p.file_dtype](p.strength) * p.expected / p.strength  # noqa: E731
    found = diagnose([p for file in FILES for p in probes(scale, file_dtype=file)])
    assert (found.code, str(found.trait)) == ("LH207", "the file's dtype rounds the strength")


def test_dtypes_that_cannot_be_told_apart_are_both_named() -> None:
    scale: Scale = lambda p: bfloat16(p.strength) * p.expected / p.strength  # noqa: E731
    made = probes(scale, file_dtype="bfloat16")
    found = rounds([p for p in made if not p.right], made)
    assert found is not None
    assert str(found[1]) == "bfloat16 rounds the strength or the file's dtype rounds the strength"


def test_one_value_is_enough_where_it_is_measured_finely() -> None:
    found = diagnose(probes(lambda p: float16(p.strength) * p.expected / p.strength, (1.0, 0.5, 0.001)))
    assert (found.code, str(found.trait)) == ("LH207", "float16 rounds the strength")


@pytest.mark.parametrize(
    "scale",
    [
        lambda p: 1.0004 * p.expected,
        lambda p: p.expected * (1.002 if p.strength < 1 else 1),
        lambda p: p.expected * (1.0003 if p.rank % 2 else 0.9997),
    ],
)
def test_what_is_off_by_something_else_is_no_rounding(scale: Scale) -> None:
    made = probes(scale)
    assert rounds([p for p in made if not p.right], made) is None


def test_float16_is_that_of_the_machine() -> None:
    for x in (0.001, 33.3, -2.0004, 1e-7, 65504.0):
        assert float16(x) == struct.unpack("e", struct.pack("e", x))[0]
    assert float16(-1e6) == float("-inf")
