"""A probe knows its module's place in the file, and which scale training gave it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.law.probe import Probe
from harness.law.scale import trained_scale, word_of

SECOND = Probe("m", 0.5, 1, (16.0, 12.0, 7.0), (2, 4, 5), 1.5, 0.25)


def test_alpha_and_rank_are_those_of_the_modules_place() -> None:
    assert [(p.alpha, p.rank) for i in range(3) if (p := replace(SECOND, index=i))] == [(16, 2), (12, 4), (7, 5)]


def test_the_trained_scale_is_strength_times_alpha_over_rank() -> None:
    assert SECOND.expected == 1.5  # 0.5 * 12 / 4
    assert replace(SECOND, strength=-3.0, index=0).expected == -24.0  # -3 * 16 / 2


def test_a_trained_scale_is_a_fraction_and_none_without_alpha_is_one() -> None:
    assert (trained_scale(3.0, 4), trained_scale(3.0, 4, rslora=True), trained_scale(None, 4)) == (0.75, 1.5, 1.0)
    assert (trained_scale(6.0, 1), trained_scale(6.0, 0)) == (6.0, 1.0)
    assert trained_scale(rank=16, alpha=6.0, rslora=True) == 1.5


def test_another_alpha_or_rank_would_have_given_another_scale() -> None:
    assert SECOND.scale_of(6.0, 3) == 1.0  # 0.5 * 6 / 3
    assert SECOND.scale_of(None, 3) == 0.5
    assert replace(SECOND, root=True).scale_of(6.0, 9) == 1.0


def test_a_stabilised_file_divides_alpha_by_the_root_of_the_rank() -> None:
    stabilised = replace(SECOND, root=True)
    assert stabilised.expected == 3.0  # 0.5 * 12 / sqrt(4)
    assert replace(stabilised, alphas=(16.0, None, 7.0)).expected == 0.5
    assert not SECOND.root


def test_a_missing_alpha_means_scale_one_and_an_alpha_of_zero_means_zero() -> None:
    assert replace(SECOND, alphas=(16.0, None, 7.0)).expected == 0.5
    assert replace(SECOND, alphas=(16.0, 0.0, 7.0)).expected == 0.0


@pytest.mark.parametrize(
    ("measured", "right"), [(1.5, True), (1.75, True), (1.25, True), (1.7501, False), (1.2499, False), (-1.5, False)]
)
def test_a_probe_is_right_within_its_tolerance_on_either_side(measured: float, right: bool) -> None:
    assert replace(SECOND, measured=measured).right is right


def test_a_plain_probe_is_single_precision_rectangular_unfused_and_in_key_order() -> None:
    assert SECOND.dtype == "float32"
    assert (SECOND.square, SECOND.fused, SECOND.permuted) == (False, False, False)


def test_a_probe_cannot_be_changed_and_can_be_kept_in_a_set() -> None:
    with pytest.raises(AttributeError):
        SECOND.measured = 2.0  # type: ignore[misc]
    assert len({SECOND, replace(SECOND), replace(SECOND, measured=2.0)}) == 2


@pytest.mark.parametrize(
    ("factor", "word"),
    [
        (-0.5, "inverted"),
        (-0.01, "inverted"),
        (0.0, "no effect"),
        (0.01, "no effect"),
        (0.011, "weaker than trained"),
        (0.8, "weaker than trained"),
        (0.81, "slightly weaker than trained"),
        (0.99, "slightly weaker than trained"),
        (0.991, "as trained"),
        (1.01, "as trained"),
        (1.011, "slightly stronger than trained"),
        (1.25, "slightly stronger than trained"),
        (1.26, "too strong: artifacts expected"),
        (8.0, "too strong: artifacts expected"),
        (8.1, "noise expected"),
        (64.0, "noise expected"),
    ],
)
def test_a_factor_has_a_word_for_what_its_picture_looks_like(factor: float, word: str) -> None:
    assert word_of(factor) == word
