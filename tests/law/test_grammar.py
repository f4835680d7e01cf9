"""Every word of the grammar does to a number what its text says, and only the trained words are free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from harness.law.grammar import ALPHA, NO_ALPHA, RANK, RANK_ALONE, SOURCES, STRENGTH, Word, word_of

STRENGTHS = (-2.5, -1.0, -0.25, 0.0, 0.25, 1.0, 1.75, 4.0)
OF_STRENGTH: dict[str, Sequence[float]] = {
    "{x}": STRENGTHS,
    "1": (1,) * 8,
    "|{x}|": (2.5, 1, 0.25, 0, 0.25, 1, 1.75, 4),
    "max({x}, 0)": (0, 0, 0, 0, 0.25, 1, 1.75, 4),
    "(1 + {x})": (-1.5, 0, 0.75, 1, 1.25, 2, 2.75, 5),
    "({x} or 1)": (-2.5, -1, -0.25, 1, 0.25, 1, 1.75, 4),
    "min({x}, 1)": (-2.5, -1, -0.25, 0, 0.25, 1, 1, 1),
    "clamp({x}, 0, 1)": (0, 0, 0, 0, 0.25, 1, 1, 1),
    "clamp({x}, -1, 1)": (-1, -1, -0.25, 0, 0.25, 1, 1, 1),
    "trunc({x})": (-2, -1, 0, 0, 0, 1, 1, 4),
    "bfloat16({x})": STRENGTHS,
    "({x} > 0)": (0, 0, 0, 0, 1, 1, 1, 1),
    "({x} != 0)": (1, 1, 1, 0, 1, 1, 1, 1),
    "{x}^2": (6.25, 1, 0.0625, 0, 0.0625, 1, 3.0625, 16),
    "sign({x})*{x}^2": (-6.25, -1, -0.0625, 0, 0.0625, 1, 3.0625, 16),
    "sign({x})*sqrt(|{x}|)": (-math.sqrt(2.5), -1, -0.5, 0, 0.5, 1, math.sqrt(1.75), 2),
    "sqrt(max({x}, 0))": (0, 0, 0, 0, 0.5, 1, math.sqrt(1.75), 2),
}

ALPHAS = (-2.5, -1.0, 0.0, 0.25, 0.75, 1.0, 2.75, 4.0)
OF_ALPHA: dict[str, Sequence[float]] = {
    "{x}": ALPHAS,
    "1": (1,) * 8,
    "trunc({x})": (-2, -1, 0, 0, 0, 1, 2, 4),
    "floor({x})": (-3, -1, 0, 0, 0, 1, 2, 4),
    "round({x})": (-2, -1, 0, 0, 1, 1, 3, 4),  # a half goes to the even neighbour, as in Python
    "ceil({x})": (-2, -1, 0, 1, 1, 1, 3, 4),
    "|{x}|": (2.5, 1, 0, 0.25, 0.75, 1, 2.75, 4),
    "max({x}, 0)": (0, 0, 0, 0.25, 0.75, 1, 2.75, 4),
    "max({x}, 1)": (1, 1, 1, 1, 1, 1, 2.75, 4),
    "min({x}, 1)": (-2.5, -1, 0, 0.25, 0.75, 1, 1, 1),
    "bfloat16({x})": ALPHAS,
    "{x}^2": (6.25, 1, 0, 0.0625, 0.5625, 1, 7.5625, 16),
    "sqrt({x})": (-math.sqrt(2.5), -1, 0, 0.5, math.sqrt(0.75), 1, math.sqrt(2.75), 2),
    "{x}^-1": (-0.4, -1, math.nan, 4, 4 / 3, 1, 4 / 11, 0.25),
}

RANKS = (1.0, 3.0, 4.0, 16.0)
OF_RANK: dict[str, Sequence[float]] = {
    "/ {x}": (1, 1 / 3, 0.25, 0.0625),
    "1": (1, 1, 1, 1),
    "/ sqrt({x})": (1, 1 / math.sqrt(3), 0.5, 0.25),
    "* {x}": (1, 3, 4, 16),
    "* sqrt({x})": (1, math.sqrt(3), 2, 4),
    "/ {x}^2": (1, 1 / 9, 0.0625, 1 / 256),
}
TABLES = ((STRENGTH, STRENGTHS, OF_STRENGTH), (ALPHA, ALPHAS, OF_ALPHA), (RANK, RANKS, OF_RANK))
CASES = [pytest.param(word, numbers, table, id=word.text) for words, numbers, table in TABLES for word in words]


@pytest.mark.parametrize(("word", "numbers", "table"), CASES)
def test_a_word_does_what_its_text_says(
    word: Word, numbers: Sequence[float], table: dict[str, Sequence[float]]
) -> None:
    found = [word.apply(number) for number in numbers]
    assert {type(number) for number in found} == {float}
    assert found == pytest.approx(table[word.text], rel=1e-15, abs=0, nan_ok=True)


def test_bfloat16_rounds_as_torch_does() -> None:
    numbers = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100, torch.arange(513) / 512])
    rounded = next(word for word in ALPHA if word.text == "bfloat16({x})")
    assert [rounded.apply(x) for x in numbers.double().tolist()] == numbers.bfloat16().double().tolist()


def test_the_tables_name_every_word_once() -> None:
    for words, _, table in TABLES:
        assert [word.text for word in words] == list(table)


# the words that are a power of their number, above zero at least; |x|, limits and roundings are none
POWERS = {
    "{x}": 1.0, "1": 0.0, "{x}^2": 2.0, "sign({x})*sqrt(|{x}|)": 0.5, "sqrt({x})": 0.5, "{x}^-1": -1.0,
    "/ {x}": -1.0, "/ sqrt({x})": -0.5, "* {x}": 1.0, "* sqrt({x})": 0.5, "/ {x}^2": -2.0,
}  # fmt: skip


@pytest.mark.parametrize("word", [*STRENGTH, *ALPHA, *RANK, *RANK_ALONE], ids=lambda word: word.text)
def test_an_exponent_is_that_of_the_power_and_other_words_have_none(word: Word) -> None:
    assert word.exponent == POWERS.get(word.text)
    if word.exponent is not None:
        for number in (0.25, 0.75, 4.0, 9.0):
            assert word.apply(number) == pytest.approx(number**word.exponent, rel=1e-12)


def free(words: Sequence[Word]) -> list[str]:
    return [word.text for word in words if word.cost == 0]


def test_only_what_training_used_is_free() -> None:
    assert free(STRENGTH) == ["{x}"]
    assert free(ALPHA) == ["{x}"]
    assert free(RANK) == ["/ {x}"]


def test_without_alpha_training_is_scale_one_and_dividing_by_the_rank_costs() -> None:
    assert free(RANK_ALONE) == ["1"]
    assert {word.cost for word in RANK_ALONE} == {0, 1}
    assert [(w.text, w.apply, w.exponent) for w in RANK_ALONE] == [(w.text, w.apply, w.exponent) for w in RANK]
    assert (NO_ALPHA.cost, [NO_ALPHA.apply(2.0), NO_ALPHA.apply(0.0)]) == (0, [1.0, 1.0])


def test_words_of_two_steps_cost_more_than_words_of_one() -> None:
    two_steps = {"(1 + {x})", "({x} > 0)", "({x} != 0)", "sign({x})*{x}^2", "sqrt(max({x}, 0))", "{x}^-1"}
    for words in (STRENGTH, ALPHA, RANK):
        for word in words[1:]:
            assert word.cost == (2 if word.text in two_steps else 1), word.text


def test_a_word_has_no_power_until_one_is_given_and_cannot_be_changed() -> None:
    word = Word("x", abs, 1)
    assert word.exponent is None
    with pytest.raises(AttributeError):
        word.cost = 0  # type: ignore[misc]


@pytest.mark.parametrize("words", [STRENGTH, ALPHA, RANK])
def test_a_power_that_the_table_has_is_its_own_word(words: Sequence[Word]) -> None:
    for word in words:
        if word.exponent is not None:
            assert word_of(words, float(f"{word.exponent:g}")) is word


@pytest.mark.parametrize(
    ("power", "bases", "values"),
    [
        (3.0, (-2, -1, 0, 1, 2), (-8, -1, 0, 1, 8)),
        (-3.0, (-2, -1, 0, 1, 2), (-0.125, -1, math.inf, 1, 0.125)),
        (1.5, (-4, -0.25, 0, 0.25, 4), (math.nan, math.nan, 0, 0.125, 8)),
        (-1.5, (-4, -0.25, 0, 0.25, 4), (math.nan, math.nan, math.inf, 8, 0.125)),
        (-0.5, (-4, -0.25, 0, 0.25, 4), (math.nan, math.nan, math.inf, 2, 0.5)),
        (0.5, (-4, -0.25, 0, 0.25, 4), (math.nan, math.nan, 0, 0.5, 2)),
        (0.0, (-4, -0.25, 0, 0.25, 4), (1, 1, 1, 1, 1)),
    ],
)
def test_any_other_power_is_that_of_the_real_numbers(
    power: float, bases: Sequence[float], values: Sequence[float]
) -> None:
    word = word_of((), power)
    assert (word.text, word.cost, word.exponent) == (f"{{x}}^{power:g}", 2, power)
    assert [word.apply(float(base)) for base in bases] == pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((5.0, 2.0, 3.0, 2.0, 8.0), (5.0, 8.0, 2.0, 8.0, 2.0, 4.0)),
        ((8.0, 3.0, 3.0, 8.0, 4.0), (8.0, 4.0, 8.0, 8.0, 3.0, 5.2)),  # of two equally common ones the first
        ((7.0,), (7.0,) * 6),
    ],
)
def test_a_source_picks_its_number_of_the_file(values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    names = ("first", "last", "most common", "max", "min", "mean")
    found = {name: pick(values) for name, pick in SOURCES.items()}
    assert found == pytest.approx(dict(zip(names, expected, strict=True)))
