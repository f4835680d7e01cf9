"""One input that counts as another number is named with what its values count as."""

from __future__ import annotations

import math

import pytest

from harness.law.diagnosis import diagnose
from tests.law.probing import SHAPES, Scale, probes, said

RANKS_AGAIN = (*SHAPES, (9.0, 5), (2.75, 7), (4.5, 6), (33.0, 12))


@pytest.mark.parametrize(
    ("scale", "code", "words"),
    [
        (lambda p: math.tanh(p.strength) * p.alpha / p.rank, "LH207", "strength 1 counts as 0.7616, 0.5 counts as"),
        (lambda p: int(p.strength * 10) / 10 * p.alpha / p.rank, "LH207", "strength 1.75 counts as 1.7, 0.25"),
        (lambda p: p.strength * p.alpha / 2 ** math.ceil(math.log2(p.rank)), "LH209", "rank 5 counts as 8, 12 counts"),
        (lambda p: p.strength * (p.alpha % 32 + 1) / p.rank, "LH205", "alpha 2.75 counts as 3.75, 33 counts as 2, ..."),
    ],
)
def test_the_one_input_that_is_bent_is_named(scale: Scale, code: str, words: str) -> None:
    found = diagnose(probes(scale, shapes=RANKS_AGAIN, strengths=(1.0, 0.5, -0.6, 1.75, 0.25)))
    assert (found.code, str(found.trait)[: len(words)]) == (code, words)


def test_a_scale_that_two_inputs_decide_is_no_bent_input() -> None:
    joint = probes(lambda p: p.strength * (p.alpha // p.rank + 0.3), shapes=RANKS_AGAIN)
    assert said(diagnose(joint)) == ("LH209", None, None)


def test_a_rank_beyond_a_bound_is_no_alpha_that_is_not_divided() -> None:
    shapes = [(a, r) for a, r in zip((8.0, 3.0, 20.0, 5.0, 7.0, 12.0), (4, 16, 32, 40, 48, 64), strict=True)]
    found = diagnose(probes(lambda p: p.strength * p.alpha / min(p.rank, 32), shapes=shapes))
    assert (found.code, str(found.trait)) == ("LH209", "a rank above 32 counts as 32")


def test_another_modules_rank_is_seen_where_alpha_is_missing_too() -> None:
    shapes = [(10.5, 5), (None, 12), (6.0, 4), (None, 6)]
    found = diagnose(
        probes(lambda p: p.strength * (p.rank if p.alpha is None else p.alpha) / p.ranks[p.index - 1], shapes=shapes)
    )
    assert said(found) == ("LH204", None, "two modules of a file differ in rank")
