"""What is said of probes: which code a law deserves, which of several readings comes first, which part is at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from harness.law.diagnosis import NO_LAW, Diagnosis, code_of, diagnose, diagnosis_record, law_name, law_record
from harness.law.grammar import ALPHA, RANK, STRENGTH
from harness.law.law import Law
from harness.law.probe import Probe

S, A, R = ({word.text: word for word in words} for words in (STRENGTH, ALPHA, RANK))
TRAINED = Law(S["{x}"], A["{x}"], R["/ {x}"])
SHAPES = ((10.5, 5), (2.75, 12), (6.0, 4), (0.625, 6), (6.0, 4), (33.0, 24), (3.5, 7))
Scale = Callable[[Probe], float]


def law(strength: str = "{x}", alpha: str = "{x}", rank: str = "/ {x}", **fields: object) -> Law:
    return replace(Law(S[strength], A[alpha], R[rank]), **fields)


def probes(
    scale: Scale,
    *,
    shapes: Sequence[tuple[float | None, int]] = SHAPES,
    strengths: Sequence[float] = (1.0, 0.5, -1.0, 2.0, 0.0, 1.75),
    names: Sequence[str] = (),
    **fields: object,
) -> list[Probe]:
    alphas, ranks = tuple(alpha for alpha, _ in shapes), tuple(rank for _, rank in shapes)
    found = []
    for strength in strengths:
        for i in range(len(shapes)):
            name = names[i] if names else f"m{i}"
            point = replace(Probe(name, strength, i, alphas, ranks, 0.0, 1e-6), **fields)
            found.append(replace(point, measured=scale(point)))
    return found


def said(found: Diagnosis) -> tuple[str | None, str | None, str | None]:
    return found.code, found.law and found.law.formula, found.trait and found.trait.text


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (law(rank="1"), "LH201"),
        (law(alpha="1", rank="1"), "LH202"),
        (law(alpha="1"), "LH202"),
        (law(alpha="1", rank="1", constant=0.5), "LH202"),
        (law(rank="/ sqrt({x})"), "LH203"),
        (law(rank="/ {x}", root=True), "LH203"),
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


@pytest.mark.parametrize(("divisor", "code"), [(2, "LH208"), (3, "LH208"), (4, "LH208"), (5, "LH209"), (0.5, "LH206")])
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
    assert diagnose(probes(lambda p: -5e-6)).law is not None


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
    ],
)
def test_of_several_readings_of_one_ratio_the_one_that_is_met_most_comes_first(
    shape: tuple[float, int], strength: float, measured: float, code: str, formula: str
) -> None:
    found = diagnose(probes(lambda p: measured, shapes=[shape] * 3, strengths=[strength]))
    assert (found.code, found.law and found.law.formula) == (code, formula)


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


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (lambda p: p.expected * (1.5 if p.rank % 2 else 1), ("LH209", "1.5 * strength * alpha / rank", "odd rank")),
        (lambda p: p.strength if 0 < p.alpha < 1 else p.expected, ("LH205", "strength", "0 < alpha < 1")),
        (
            lambda p: 2 * p.expected if p.strength < 0 else p.expected,
            ("LH207", "2 * strength * alpha / rank", "negative strength"),
        ),
        (
            lambda p: p.expected * (0.7 if p.module in ("m1", "m5") else 1),
            ("LH209", "0.7 * strength * alpha / rank", "2 of the modules"),
        ),
    ],
)
def test_the_part_that_is_wrong_is_named_with_its_law(scale: Scale, expected: tuple[str | None, ...]) -> None:
    assert said(diagnose(probes(scale))) == expected


def test_a_strength_that_breaks_every_scale_is_a_fault_of_the_strength() -> None:
    noise = iter((0.3, 1.9, -0.7, 2.2, 5.0, -3.1, 0.8))
    found = diagnose(probes(lambda p: next(noise) if p.strength < 0 else p.expected))
    assert said(found) == ("LH207", None, "negative strength")
    assert found.family == "strength"


def test_values_of_alpha_that_break_every_scale_are_a_fault_of_alpha() -> None:
    noise = iter((0.3, 1.9, -0.7, 2.2, 5.0, -3.1, 0.8, 4.4, 1.2, 9.1, 0.1, 7.7) * 3)
    found = diagnose(probes(lambda p: next(noise) if p.alpha > p.rank else p.expected))
    assert (found.code, found.law, found.trait and found.trait.text) == ("LH205", None, "alpha > rank")
    assert found.family == "scale"


def test_ranks_that_break_every_scale_have_no_better_name_than_another_law() -> None:
    noise = iter((0.3, 1.9, -0.7, 2.2, 5.0, -3.1, 0.8, 4.4, 1.2, 9.1, 0.1, 7.7) * 3)
    found = diagnose(probes(lambda p: next(noise) if p.rank % 2 else p.expected))
    assert said(found) == ("LH209", None, "odd rank")


def test_alpha_beyond_a_bound_that_counts_as_the_bound_is_a_clamp() -> None:
    shapes = ((2.5, 3), (7.0, 9), (11.0, 4), (1.5, 7), (9.0, 6), (0.5, 2), (4.5, 4))
    clamped = lambda p: p.strength * min(p.alpha, 5.0) / p.rank  # noqa: E731
    found = diagnose(probes(clamped, shapes=shapes) + probes(clamped, shapes=shapes[::-1]))
    assert said(found) == ("LH205", None, "alpha beyond 5")


def test_a_strength_beyond_a_bound_that_counts_as_the_bound_is_a_clamp() -> None:
    strengths = (0.5, 1.25, 2.5, -1.0, 3.0, 1.75, 4.0)
    found = diagnose(probes(lambda p: min(p.strength, 1.5) * p.alpha / p.rank, strengths=strengths))
    assert said(found) == ("LH207", None, "strength beyond 1.5")


def test_scales_that_scatter_beyond_a_bound_are_no_clamp() -> None:
    shapes = ((2.5, 3), (7.0, 9), (11.0, 4), (1.5, 7), (9.0, 6), (0.5, 2), (4.5, 4))
    near = {7.0: 5.0, 11.0: 4.6, 9.0: 5.3}
    points = probes(lambda p: p.strength * near.get(p.alpha, p.alpha) / p.rank, shapes=shapes)
    found = diagnose(points)
    assert found.code == "LH205"
    assert found.trait is not None
    assert "beyond" not in found.trait.text


NOISE = (0.3, 1.9, -0.7, 2.2, 5.0, -3.1, 0.8, 4.4, 1.2, 9.1, 0.1, 7.7)


def test_a_change_too_small_to_measure_has_no_law() -> None:
    faint = diagnose(probes(lambda p: 0.03 if p.alpha > p.rank else p.expected, tolerance=0.01))
    assert said(faint) == ("LH205", None, "alpha > rank")
    half = diagnose(probes(lambda p: 0.3 * p.expected if p.rank % 2 else p.expected, strengths=[0.25, 0.5]))
    assert said(half) == ("LH209", "0.3 * strength * alpha / rank", "odd rank")


def test_a_right_scale_too_small_to_measure_contradicts_no_trait() -> None:
    noise = iter(NOISE * 3)

    def faint_or_wrong(p: Probe) -> float:
        return p.expected if p.alpha <= p.rank or p.strength == 0.01 else next(noise)

    found = diagnose(probes(faint_or_wrong, strengths=(1.0, 0.5, -1.0, 2.0, 1.75, 0.01), tolerance=0.01))
    assert said(found) == ("LH205", None, "alpha > rank")


NAMES = [f"blocks.{i // 2}.{'xy'[i % 2]}" for i in range(6)]
SIX = SHAPES[:6]


def by_block(*factors: float) -> Scale:
    return lambda p: factors[int(p.module.split(".")[1])] * p.expected


def test_a_factor_of_its_own_for_each_block_is_named() -> None:
    found = diagnose(probes(by_block(0.5, 1.0, 1.3), shapes=SIX, names=NAMES, strengths=[1.0]))
    assert said(found) == (
        "LH209", "c(block) * strength * alpha / rank", "each block of the model has a factor of its own",
    )  # fmt: skip
    assert found.law is not None
    assert dict(found.law.factors) == pytest.approx({"blocks.0": 0.5, "blocks.1": 1.0, "blocks.2": 1.3})
    assert found.law.predict(probes(lambda p: 0.0, shapes=SIX, names=NAMES, strengths=[1.0]))[4] == pytest.approx(
        1.3 * 6.0 / 4
    )
    assert law_record(found.law).constant is None
    assert not found.law.is_trained


def test_a_stabilised_file_can_have_a_factor_for_each_block_too() -> None:
    found = diagnose(probes(by_block(0.5, 1.0, 1.3), shapes=SIX, names=NAMES, strengths=[1.0], root=True))
    assert found.law is not None
    assert found.law.formula == "c(block) * strength * alpha / sqrt(rank)"
    assert found.law.root


BLOCKWISE = ("LH209", "c(block) * strength * alpha / rank", "each block of the model has a factor of its own")


def test_the_factor_of_a_block_is_heard_through_noise_within_the_tolerance() -> None:
    names = [f"blocks.{i // 3}.{i % 3}" for i in range(6)]

    def noisy(p: Probe) -> float:
        return by_block(0.5, 1.3)(p) + (0.012 if p.index in (0, 3) and p.strength == 2 else 0)

    assert said(diagnose(probes(noisy, shapes=SIX, names=names, strengths=[1.0, 2.0], tolerance=0.01))) == BLOCKWISE


def test_modules_too_faint_to_measure_have_no_say_in_the_factor_of_their_block() -> None:
    names = [f"blocks.{i // 5}.{i % 5}" for i in range(10)]
    clear, faint = ((10.5, 5), (2.75, 12)), ((0.08, 4), (0.06, 4), (0.09, 5))
    points = probes(
        lambda p: by_block(0.5, 1.3)(p) + (0.012 if p.alpha < 0.1 else 0),
        shapes=(*clear, *faint, *clear, *faint), names=names, strengths=[1.0], tolerance=0.01,
    )  # fmt: skip
    assert said(diagnose(points)) == BLOCKWISE


def test_blocks_of_one_module_or_with_two_factors_are_no_law() -> None:
    alone = [f"blocks.{i}.x" for i in range(6)]
    each = diagnose(probes(lambda p: (0.5 + 0.1 * p.index) * p.expected, shapes=SIX, names=alone, strengths=[1.0]))
    assert (each.law, each.code) == (None, "LH209")
    mixed = probes(lambda p: (0.5 + 0.1 * p.index) * p.expected, shapes=SIX, names=NAMES, strengths=[1.0])
    assert diagnose(mixed).law is None


def test_a_law_of_many_scattered_faults_is_named_and_of_few_it_is_not() -> None:
    def scattered(p: Probe) -> float:
        return p.strength * 6.0 / p.rank if (p.index + int(4 * p.strength)) % 3 else p.expected

    found = diagnose(probes(scattered))
    assert found.trait is not None
    assert (found.code, found.trait.text) == ("LH204", "some modules of some files")
    few = [p for p in probes(scattered) if p.strength == 1.0]
    assert diagnose(few).trait != found.trait


def test_what_permuted_files_say_of_places_is_not_heard() -> None:
    right = probes(lambda p: p.expected)
    odd = [replace(p, measured=1.5 * p.expected, permuted=True) for p in right if p.index == 2]
    assert said(diagnose([*right, *odd])) == ("LH209", "1.5 * strength * alpha / rank", "keys permuted")
    assert diagnose([replace(p, permuted=True) for p in right]).code is None


def test_a_diagnosis_without_a_law_is_recorded_as_none() -> None:
    assert diagnosis_record(Diagnosis(None, "LH209")) == NO_LAW
    assert diagnosis_record(Diagnosis(TRAINED, None)) == law_record(TRAINED)
    assert law_record(TRAINED).exponents == {"strength": 1.0, "alpha": 1.0, "rank": -1.0}
    assert (law_record(TRAINED).name, law_record(TRAINED).ambiguous) == ("as trained", False)
    assert law_name(law(rank="1")) == "alpha not divided by rank"
