from __future__ import annotations

import pytest

from harness.images.factor import Estimate
from harness.images.verdict import Look, StrengthResult, judge, look_of


def seen(
    strength: float,
    factor: float = 1.0,
    *,
    width: float = 0.02,
    look: Look = "clean",
    effect: float = 0.3,
    own_noise: float = 0.0,
    residual: float = 0.0,
) -> StrengthResult:
    place = strength * factor
    ends = sorted((place * (1 - width), place * (1 + width)))
    return StrengthResult(strength, Estimate(place, (ends[0], ends[1]), residual), effect, own_noise, look)


def test_the_right_strength_everywhere_is_as_trained():
    found = judge([seen(0), seen(0.5), seen(1), seen(2, look="artifacts"), seen(32, look="noise")])
    assert (found.finding, found.code) == ("as trained", None)
    assert found.factor == pytest.approx(1)


@pytest.mark.parametrize("factor", [0.25, 0.8, 1.25, 2.0])
def test_a_factor_is_wrong_strength_with_its_size(factor: float):
    found = judge([seen(0.5, factor), seen(1, factor)])
    assert (found.finding, found.code) == ("wrong strength", "LH602")
    assert found.factor == pytest.approx(factor)


def test_noise_at_the_trained_strength_is_noise():
    found = judge([seen(0.25, 32, look="noise"), seen(1, 32, look="noise")])
    assert (found.finding, found.code) == ("noise", "LH601")
    assert found.factor == pytest.approx(32)


def test_noise_at_high_strength_is_what_training_does_there():
    assert judge([seen(1), seen(32, look="noise")]).finding == "as trained"


def test_no_change_at_all_is_no_visible_effect():
    assert judge([seen(1, 0.001), seen(2, 0.001)]).code == "LH603"


def test_the_factor_is_read_where_pictures_still_follow_the_strength():
    found = judge([seen(0.25, 8, width=0.01), seen(1, 9, width=0.4, look="noise")])
    assert found.factor == pytest.approx(8)


def test_an_effect_below_the_visible_is_inconclusive_even_when_it_seems_wrong():
    assert judge([seen(1, 2, effect=0.001)]).finding == "inconclusive"


def test_an_effect_below_the_candidates_own_noise_is_inconclusive():
    assert judge([seen(1, 2, effect=0.1, own_noise=0.05)]).finding == "inconclusive"


def test_an_interval_too_wide_is_inconclusive_and_not_a_pass():
    assert judge([seen(1, 1.02, width=0.3)]).finding == "inconclusive"


def test_one_broken_strength_is_broken():
    assert judge([seen(1), StrengthResult(8, None, 0.3, 0.0, "broken")]).code == "LH502"


def test_a_change_that_no_strength_explains_is_a_wrong_direction():
    found = judge([seen(1, 1.0, residual=0.8)])
    assert (found.finding, found.code) == ("wrong direction", "LH602")


def test_strength_squared_is_found_although_it_is_right_at_one():
    found = judge([seen(0.5, 0.5), seen(1), seen(2, 2.0)])
    assert found.finding == "wrong strength"
    assert "mishandled" in found.reason


def test_a_change_at_strength_zero_is_found():
    zero = StrengthResult(0.0, Estimate(0.5, (0.48, 0.52), 0.0), 0.0, 0.0, "clean")
    assert judge([zero, seen(1)]).reason == "strength 0 changes the pictures"


@pytest.mark.parametrize(
    ("variation", "sigma", "content", "look"),
    [
        (1.0, 1.0, 1.0, "clean"),
        (1.6, 1.0, 1.0, "artifacts"),
        (1.0, 5.0, 1.0, "artifacts"),
        (1.0, 1.0, 0.6, "artifacts"),
        (6.0, 9.0, 0.9, "noise"),
        (2.0, 40.0, 0.9, "noise"),
        (0.8, 1.0, 0.05, "noise"),
    ],
)
def test_the_look_follows_ratios_and_content(variation: float, sigma: float, content: float, look: str):
    assert look_of(variation, sigma, content) == look
