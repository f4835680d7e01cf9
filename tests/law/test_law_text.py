"""What a law says of itself: its text, its distance from training, its predictions and the strength to pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from harness.law.grammar import ALPHA, NO_ALPHA, RANK, RANK_ALONE, STRENGTH, Word, word_of
from harness.law.law import Law
from harness.law.probe import Probe

S, A, R = ({word.text: word for word in words} for words in (STRENGTH, ALPHA, RANK))
TRAINED = Law(S["{x}"], A["{x}"], R["/ {x}"])
STABILISED = replace(TRAINED, rank=R["/ sqrt({x})"], root=True)


def law(strength: str = "{x}", alpha: str = "{x}", rank: str = "/ {x}", **fields: object) -> Law:
    return replace(Law(S[strength], A[alpha], R[rank]), **fields)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (TRAINED, "strength * alpha / rank"),
        (law(rank="1"), "strength * alpha"),
        (law(alpha="1"), "strength / rank"),
        (law(alpha="1", rank="1"), "strength"),
        (law("1"), "alpha / rank"),
        (law("1", "1"), "1 / rank"),
        (law("1", "1", "1"), "1"),
        (law("1", "1", "1", constant=0.5), "0.5"),
        (law(constant=0.5), "0.5 * strength * alpha / rank"),
        (law(constant=2.0), "2 * strength * alpha / rank"),
        (law(constant=0.0), "0 * strength * alpha / rank"),
        (law(constant=-1 / 3), "-0.3333 * strength * alpha / rank"),
        (law("1", constant=12345.6), "1.235e+04 * alpha / rank"),
        (law("max({x}, 0)", "trunc({x})", "* sqrt({x})"), "max(strength, 0) * trunc(alpha) * sqrt(rank)"),
        (law(alpha_source="first"), "strength * alpha(first) / rank"),
        (law(rank_source="most common"), "strength * alpha / rank(most common)"),
        (law(alpha="{x}^2", alpha_source="max", rank_source="min"), "strength * alpha(max)^2 / rank(min)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_formula_names_what_the_law_has_and_leaves_out_factors_of_one(found: Law, text: str) -> None:
    assert found.formula == text


@pytest.mark.parametrize(
    ("found", "cost"),
    [
        (TRAINED, 0),
        (law("1"), 1),
        (law(alpha="1"), 1),
        (law(rank="1"), 1),
        (law(alpha_source="first"), 1),
        (law(rank_source="max"), 1),
        (law(alpha_source="first", rank_source="max"), 2),
        (law(constant=0.5), 1),
        (law(constant=2.0), 1),
        (law("(1 + {x})", "{x}^-1", "1"), 5),
        (law("1", "1", "1", alpha_source="last", rank_source="min", constant=-1.0), 6),
    ],
)
def test_every_step_away_from_training_costs(found: Law, cost: int) -> None:
    assert found.cost == cost
    assert found.is_trained is (cost == 0)


def test_a_stabilised_file_is_trained_with_the_root_of_its_rank_and_nothing_else() -> None:
    assert STABILISED.is_trained
    assert not replace(STABILISED, root=False).is_trained
    assert not replace(TRAINED, root=True).is_trained
    assert not replace(STABILISED, constant=2.0).is_trained
    assert not replace(STABILISED, rank=R["1"]).is_trained


def test_exponents_are_those_of_the_words() -> None:
    assert TRAINED.exponents == {"strength": 1.0, "alpha": 1.0, "rank": -1.0}
    odd = law("|{x}|", "1", "* sqrt({x})")
    assert odd.exponents == {"strength": None, "alpha": 0.0, "rank": 0.5}


def test_a_law_that_was_not_fitted_is_off_by_nothing() -> None:
    assert TRAINED.residual == 0.0


def test_a_law_is_ambiguous_when_it_has_alternatives() -> None:
    assert not TRAINED.ambiguous
    assert replace(TRAINED, others=(law(alpha="1", rank="1"),)).ambiguous
    assert replace(TRAINED, others=(law(alpha="1", rank="1"), TRAINED)).alternatives == ("strength",)
    assert replace(law(alpha="1", rank="1"), others=(TRAINED,)).alternatives == ("strength * alpha / rank",)


def test_a_law_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TRAINED.constant = 2.0  # type: ignore[misc]


def point(strength: float, index: int, alphas: tuple[float | None, ...], ranks: tuple[int, ...]) -> Probe:
    return Probe("m", strength, index, alphas, ranks, 0.0, 0.0)


POINTS = [
    point(0.5, 0, (6.0, 3.0, 3.0), (2, 4, 16)),
    point(-2.0, 2, (6.0, 3.0, 3.0), (2, 4, 16)),
    point(4.0, 1, (0.0, 5.5), (9, 4)),
    point(1.0, 0, (0.0, 5.5), (9, 4)),
]


@pytest.mark.parametrize(
    ("found", "scales"),
    [
        (TRAINED, (1.5, -0.375, 5.5, 0.0)),
        (law(constant=-2.0), (-3.0, 0.75, -11.0, 0.0)),
        (law(alpha="1"), (0.25, -0.125, 1.0, 1 / 9)),
        (law("{x}^2", rank="1"), (1.5, 12.0, 88.0, 0.0)),
        (law(alpha_source="first"), (1.5, -0.75, 0.0, 0.0)),
        (law(alpha_source="most common"), (0.75, -0.375, 0.0, 0.0)),
        (law(alpha_source="mean", rank="1"), (2.0, -8.0, 11.0, 2.75)),
        (law("1", "1", "* {x}", rank_source="last"), (16.0, 16.0, 4.0, 4.0)),
        (law("1", "1", "* {x}", rank_source="min"), (2.0, 2.0, 4.0, 4.0)),
        (law("1", rank="1", alpha_source="max"), (6.0, 6.0, 5.5, 5.5)),
    ],
)
def test_a_prediction_puts_each_probe_into_the_formula(found: Law, scales: tuple[float, ...]) -> None:
    assert found.predict(POINTS) == pytest.approx(scales, rel=1e-12, abs=0)


def test_where_alpha_is_missing_a_law_of_the_rank_alone_still_predicts() -> None:
    alone = Law(STRENGTH[0], NO_ALPHA, RANK_ALONE[0])
    assert list(alone.predict([point(3.0, 1, (None, None), (2, 4))])) == [0.75]


def test_the_alpha_of_another_module_is_nothing_where_no_module_has_one() -> None:
    assert law(alpha_source="first").predict([point(3.0, 1, (None, None), (2, 4))]) == [0.0]


CUBE = word_of(STRENGTH, 3.0)
SCALES = [(16.0, 32), (8.0, 16)]  # alpha / rank = 0.5 for both


@pytest.mark.parametrize(
    ("found", "scales", "use"),
    [
        (TRAINED, SCALES, 1.0),
        (TRAINED, [(3.0, 7), (5.0, 2), (4.0, 1)], 1.0),
        (law(constant=4.0), SCALES, 0.25),
        (law(constant=-0.5), SCALES, -2.0),
        (law(rank="1"), [(16.0, 32), (4.0, 32)], 1 / 32),
        (law(alpha="1", rank="1"), SCALES, 0.5),
        (law(alpha_source="first"), [(8.0, 4), (8.0, 16)], 1.0),
        (law(alpha="1", rank="1"), [(0.0, 4)], 0.0),
        (law("{x}^2", constant=4.0), SCALES, 0.5),  # 4 * 0.5^2 = 1
        (law("sign({x})*{x}^2", constant=-1 / 9), SCALES, -3.0),  # -(3^2) * -1/9 = 1
        (law("(1 + {x})"), SCALES, 0.0),
        (law("(1 + {x})", constant=0.5), SCALES, 1.0),
        (law("sign({x})*sqrt(|{x}|)", constant=4.0), SCALES, 0.0625),  # 4 * sqrt(1 / 16) = 1
        (law("sign({x})*sqrt(|{x}|)", constant=-0.5), SCALES, -4.0),
        (law("|{x}|", constant=0.5), SCALES, 2.0),
        (law("1"), SCALES, 1.0),  # the strength is not read, and the scale is right
        (law(rank="1"), [(0.0, 4), (2.0, 4)], 0.25),  # nothing is wanted of alpha = 0, and nothing comes
        (law(rank="1"), [(2.0, 4), (0.0, 4)], 0.25),
        (law("({x} or 1)"), SCALES, 1.0),
        (law("sqrt(max({x}, 0))", constant=0.25), SCALES, 16.0),  # sqrt(16) / 4 = 1
        (replace(TRAINED, strength=CUBE, constant=0.125), SCALES, 2.0),
        (replace(TRAINED, strength=CUBE, constant=-0.125), SCALES, -2.0),
        (replace(TRAINED, strength=word_of(STRENGTH, -1.0), constant=2.0), SCALES, 2.0),
    ],
)
def test_the_strength_to_pass_gives_the_trained_scale(found: Law, scales: list[tuple[float, int]], use: float) -> None:
    assert found.prescription(scales) == pytest.approx(use, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("found", "scales"),
    [
        (TRAINED, []),
        (law("1", constant=2.0), SCALES),
        (law("|{x}|", constant=-1.0), SCALES),  # no strength turns the sign
        (law("{x}^2", constant=-1.0), SCALES),
        (law("min({x}, 1)", constant=0.25), SCALES),  # 4 is needed, 1 is the most
        (law(rank="1"), SCALES),  # 1 / 32 for one, 1 / 16 for the other
        (law(alpha="trunc({x})"), [(0.5, 4)]),  # nothing comes where something is wanted
        (law(alpha="{x}^-1"), [(0.0, 4)]),  # 1 / 0
        (law(alpha="{x}^-1"), [(2.0, 4), (0.0, 4)]),
    ],
)
def test_no_strength_is_given_where_none_reproduces_training(found: Law, scales: list[tuple[float, int]]) -> None:
    assert found.prescription(scales) is None


def test_every_gain_needs_a_scale_that_is_wanted() -> None:
    with pytest.raises(ValueError, match="zip"):
        TRAINED.strength_for([1.0], [1.0, 2.0])


def test_a_stabilised_file_is_reproduced_with_the_root_of_its_rank() -> None:
    assert STABILISED.prescription([(3.0, 16), (5.0, 4)]) == pytest.approx(1.0, rel=1e-12)
    divides_by_the_rank = replace(TRAINED, root=True)
    assert divides_by_the_rank.prescription([(3.0, 16), (5.0, 16)]) == pytest.approx(4.0, rel=1e-12)
    assert divides_by_the_rank.prescription([(3.0, 16), (5.0, 4)]) is None


@pytest.mark.parametrize(
    ("difference", "same"), [(2e-5, True), (-2e-5, True), (5e-4, False), (-5e-4, False), (1.0, False)]
)
def test_modules_need_one_strength_to_four_digits(difference: float, same: bool) -> None:
    scales = [(16.0, 16), (16.0 * (1 + difference), 16)]
    found = law(alpha="1", rank="1").prescription(scales)
    assert found == (1.0 if same else None)


def test_what_a_strength_word_reaches_is_reached_to_nine_digits() -> None:
    nearly = Word("nearly {x}", lambda u: u * (1 + 1e-7), 1)
    assert replace(TRAINED, strength=nearly, constant=2.0).prescription(SCALES) is None
    exactly_enough = Word("nearly {x}", lambda u: u * (1 + 1e-11), 1)
    found = replace(TRAINED, strength=exactly_enough, constant=2.0).prescription(SCALES)
    assert found is not None
    assert math.isclose(found, 0.5, rel_tol=1e-9)
