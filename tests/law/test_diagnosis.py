"""What is said of probes that one law explains: which code it deserves and which of several readings comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from harness.law.diagnosis import NO_LAW, Diagnosis, code_of, diagnose, diagnosis_record, law_name, law_record
from harness.law.grammar import ALPHA, RANK, STRENGTH
from harness.law.law import Law
from harness.law.probe import Probe
from tests.law.probing import Scale, probes, said

S, A, R = ({word.text: word for word in words} for words in (STRENGTH, ALPHA, RANK))
TRAINED = Law(S["{x}"], A["{x}"], R["/ {x}"])


def law(strength: str = "{x}", alpha: str = "{x}", rank: str = "/ {x}", **fields: object) -> Law:
    return replace(Law(S[strength], A[alpha], R[rank]), **fields)


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (law(rank="1"), "LH201"),
        (law(alpha="1", rank="1"), "LH202"),
        (law(alpha="1"), "LH202"),
        (law(alpha="1", rank="1", constant=0.5), "LH202"),
        (law(rank="/ sqrt({x})"), "LH203"),
        (law(rank="/ {x}", root=True), "LH203"),
        (law(alpha="1", rank="1", root=True), "LH202"),
        (law(rank="/ sqrt({x})", root=True, constant=0.5), "LH209"),
        (law(rank="/ sqrt({x})", root=True, constant=2.0), "LH206"),
        (law(alpha_source="first"), "LH204"),
        (law(rank_source="max"), "LH204"),
        (law("1", alpha_source="first"), "LH204"),
        (law("1"), "LH207"),
        (law("|{x}|"), "LH207"),
        (law("{x}^2", constant=2.0), "LH207"),
        (law("{x}^2", rank="1"), "LH201"),
        (law(alpha="trunc({x})"), "LH205"),
        (law("1", alpha="max({x}, 1)"), "LH205"),
        (law(alpha="{x}^2", rank="/ {x}^2"), "LH206"),
        (law(alpha="sqrt({x})", rank="/ sqrt({x})"), "LH206"),
        (law(constant=2.0), "LH206"),
        (law(constant=3.0), "LH209"),
        (law(constant=1 / 3), "LH209"),
        (law(alpha="{x}^2"), "LH209"),
        (law(rank="* {x}"), "LH209"),
        (law(factors=(("blocks.0", 0.5), ("blocks.1", 0.7))), "LH209"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.formula,
)
def test_each_law_has_the_code_of_how_it_differs_from_training(found: Law, code: str) -> None:
    assert code_of(found) == code


@pytest.mark.parametrize(
    ("divisor", "code"),
    [
        (2, "LH208"),
        (3, "LH208"),
        (4, "LH208"),
        (3.0000004, "LH208"),
        (3.000004, "LH209"),
        (5, "LH209"),
        (0.5, "LH206"),
    ],
)
def test_a_part_of_the_scale_in_merged_layers_is_the_stacked_rank(divisor: float, code: str) -> None:
    assert code_of(law(constant=1 / divisor), fused_only=True) == code


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (lambda p: p.expected, (None, "strength * alpha / rank", None)),
        (lambda p: p.strength * p.alpha, ("LH201", "strength * alpha", None)),
        (lambda p: 0.7 * p.expected, ("LH209", "0.7 * strength * alpha / rank", None)),
        (lambda p: p.expected / 3 if p.fused else p.expected, (None, "strength * alpha / rank", None)),
    ],
)
def test_one_law_for_all_is_named(scale: Scale, expected: tuple[str | None, ...]) -> None:
    assert said(diagnose(probes(scale))) == expected


def test_a_third_of_every_merged_layer_is_the_stacked_rank() -> None:
    assert diagnose(probes(lambda p: p.expected / 3, fused=True)).code == "LH208"
    assert diagnose(probes(lambda p: p.expected / 3)).code == "LH209"


def test_zeros_alone_have_no_law() -> None:
    nothing = diagnose(probes(lambda p: 0.0))
    assert (nothing.law, nothing.code, nothing.trait) == (None, "LH101", None)
    assert diagnose(probes(lambda p: 3.9e-6)).law is None
    assert diagnose(probes(lambda p: -4.1e-6)).law is not None


def test_without_probes_nothing_is_wrong() -> None:
    assert diagnose([]) == Diagnosis(None, None)


def test_modules_that_coverage_reports_need_no_law() -> None:
    points = probes(lambda p: 0.0 if p.module == "m2" else p.expected)
    assert diagnose(points, unloaded=["m2"]).code is None
    assert diagnose(points).code is not None


@pytest.mark.parametrize(
    ("shape", "strength", "measured", "code", "formula"),
    [
        ((4.0, 8), 1.0, 0.25, "LH209", "0.5 * strength * alpha / rank"),
        ((4.0, 8), 1.0, 1.0, "LH202", "strength"),
        ((4.0, 8), 1.0, 4.0, "LH201", "strength * alpha"),
        ((8.0, 4), 1.0, 4.0, "LH203", "strength * alpha / sqrt(rank)"),
        ((3.0, 2), 1.0, 2.25, "LH209", "1.5 * strength * alpha / rank"),
        ((3.0, 2), 1.0, 3.0, "LH201", "strength * alpha"),
        ((5.0, 8), 1.0, 1.25, "LH206", "2 * strength * alpha / rank"),
        ((5.0, 8), 0.5, 0.625, "LH207", "alpha / rank"),
        ((5.0, 8), 0.5, 0.15625, "LH207", "strength^2 * alpha / rank"),
        ((5.0, 8), 0.25, 0.78125, "LH207", "(1 + strength) * alpha / rank"),
        ((5.0, 8), 0.25, 0.109375, "LH209", "0.7 * strength * alpha / rank"),
        ((2.0, 18), 1.0, 1 / 3, "LH209", "3 * strength * alpha / rank"),
    ],
)
def test_of_several_readings_of_one_ratio_the_one_that_is_met_most_comes_first(
    shape: tuple[float, int], strength: float, measured: float, code: str, formula: str
) -> None:
    found = diagnose(probes(lambda p: measured, shapes=[shape] * 3, strengths=[strength]))
    assert (found.code, found.law and found.law.formula) == (code, formula)


def test_a_factor_is_met_more_often_than_another_modules_alpha_that_fits_better() -> None:
    points = probes(lambda p: p.strength * 2.1 * (1 / p.rank), shapes=[(2.1, 6), *[(0.7, rank) for rank in (5, 7, 11)]])
    found = diagnose([p for p in points if p.index])
    assert found.law is not None
    assert "strength * alpha(first) / rank" in found.law.alternatives
    assert (found.code, found.law.formula) == ("LH209", "3 * strength * alpha / rank")


def test_of_two_factors_of_a_mishandled_strength_the_one_that_fits_better_comes_first() -> None:
    found = diagnose(probes(lambda p: 2 * abs(p.strength) * p.alpha / p.rank, strengths=[0.25, -0.2500001]))
    assert said(found) == ("LH207", "2 * |strength| * alpha / rank", None)
    assert found.law is not None
    assert "0.5 * alpha / rank" in found.law.alternatives


def test_all_readings_are_kept_and_named() -> None:
    half = diagnose(probes(lambda p: 0.25, shapes=[(4.0, 8)], strengths=[1.0])).law
    assert half is not None
    assert {"strength * alpha^2 / rank^2", "0.5 * strength * alpha / rank"} <= {half.formula, *half.alternatives}
    assert half.formula not in half.alternatives
    assert law_name(half).split(", or ")[0] == "0.5 times the trained scale"
    assert "scale applied twice, squared or as its root" in law_name(half)
    record = law_record(half)
    assert (record.ambiguous, record.alternatives, record.constant) == (True, half.alternatives, 0.5)


def test_a_right_scale_is_as_trained_whatever_else_it_may_be() -> None:
    same = diagnose(probes(lambda p: p.expected, shapes=[(8.0, 8)], strengths=[1.0]))
    assert same.code is None
    assert same.law is not None
    assert same.law.alternatives == ("strength",)
    assert law_name(same.law) == "as trained"


def test_stabilised_files_are_named_beside_their_own_training() -> None:
    right = diagnose(probes(lambda p: p.expected, root=True))
    assert (right.code, right.law and right.law.is_trained) == (None, True)
    plain = diagnose(probes(lambda p: p.strength * (p.alpha or 0) / p.rank, root=True))
    assert (plain.code, plain.law and plain.law.root) == ("LH203", True)
    half = diagnose(probes(lambda p: 0.5 * p.expected, root=True, shapes=[(3.0, 7)], strengths=[1.0]))
    assert (half.code, half.law and half.law.formula) == ("LH209", "0.5 * strength * alpha / sqrt(rank)")


def test_a_diagnosis_without_a_law_is_recorded_as_none() -> None:
    assert diagnosis_record(Diagnosis(None, "LH209")) == NO_LAW
    assert diagnosis_record(Diagnosis(TRAINED, None)) == law_record(TRAINED)
    assert law_record(TRAINED).exponents == {"strength": 1.0, "alpha": 1.0, "rank": -1.0}
    assert (law_record(TRAINED).name, law_record(TRAINED).ambiguous) == ("as trained", False)
    assert law_name(law(rank="1")) == "alpha not divided by rank"


def test_a_diagnosis_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        Diagnosis(None, None).code = "LH209"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (lambda s: max(-2.0, min(2.0, s)), "alpha / rank beyond 2, which caps it"),
        (lambda s: min(2.0, s), "alpha / rank beyond 2, which caps it"),
        (lambda s: max(-2.0, s), "alpha / rank beyond -2, which caps it"),
    ],
)
def test_a_cap_on_either_side_or_both_is_said_with_its_sign(scale: Callable[[float], float], words: str) -> None:
    shapes = [(a, r) for a in (-30.0, -12.0, -9.0, -2.0, 1.0, 4.0, 9.0, 16.0, 40.0) for r in (2, 3, 4)]
    probes = [Probe("a", u, 0, (a,), (r,), u * scale(a / r), 1e-6) for a, r in shapes for u in (1.0, 0.5, -1.5)]
    found = diagnose(probes)
    assert (found.code, str(found.trait)) == ("LH205", words)


@pytest.mark.parametrize(
    ("scale", "code", "words"),
    [
        (
            lambda p: p.expected if abs(p.strength) > 0.3 else 0.0,
            "LH207",
            "a strength of 0.25 or less counts as 0 (right from 0.5 on)",
        ),
        (
            lambda p: p.expected if abs(p.alpha or 1) > 0.7 else 0.0,
            "LH205",
            "an alpha of 0.625 or less counts as 0 (right from 2.75 on)",
        ),
        (
            lambda p: p.expected if abs(p.expected) > 0.03 else 0.0,
            "LH209",
            "a scale of 0.02604 or less counts as 0 (right from 0.05208 on)",
        ),
    ],
)
def test_a_small_number_that_counts_as_0_is_named(scale: Scale, code: str, words: str) -> None:
    found = diagnose(probes(scale, strengths=(1.0, 0.5, -1.0, 2.0, 0.25)))
    assert (found.code, str(found.trait)) == (code, words)
