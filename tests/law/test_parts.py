"""Where no one law explains everything: the part that is at fault, a bound, a factor for each block, one input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from harness.law.diagnosis import diagnose, law_record
from harness.law.probe import Probe
from tests.law.probing import SHAPES, Scale, probes, said


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (lambda p: p.expected * (1.5 if p.rank % 2 else 1), ("LH209", "1.5 * strength * alpha / rank", "odd rank")),
        (lambda p: p.strength if 0 < p.alpha < 1 else p.expected, ("LH205", "strength", "0 < alpha < 1")),
        (lambda p: p.strength if p.rank % 2 else p.expected, ("LH202", "strength", "odd rank")),
        (
            lambda p: p.strength * p.alpha if p.alpha > p.rank else p.expected,
            ("LH201", "strength * alpha", "alpha > rank"),
        ),
        (
            lambda p: 2 * p.expected if p.alpha > p.rank else p.expected,
            ("LH206", "2 * strength * alpha / rank", "alpha > rank"),
        ),
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
    assert found.family == "scale"


BOUNDED = ((2.5, 3), (7.0, 9), (11.0, 4), (1.5, 7), (9.0, 6), (0.5, 2), (4.5, 4))


def clamp(bound: float, how: Callable[[float, float], float], *, root: bool = False) -> list[Probe]:
    """Return three files in which alpha is at most (`min`), or at least (`max`), the bound."""

    def scale(p: Probe) -> float:
        return p.expected / p.alpha * how(p.alpha, bound)

    files = BOUNDED, BOUNDED[::-1], BOUNDED[1:] + BOUNDED[:1]
    return [probe for shapes in files for probe in probes(scale, shapes=shapes, root=root)]


def test_alpha_beyond_a_bound_that_counts_as_the_bound_is_a_clamp() -> None:
    for bounded in (clamp(5.0, min), clamp(5.0, min, root=True)):
        assert said(diagnose(bounded)) == ("LH205", None, "alpha beyond 5")
    assert said(diagnose(clamp(3.25, max))) == ("LH205", None, "alpha beyond 3.25")


@pytest.mark.parametrize("root", [False, True])
def test_a_strength_beyond_a_bound_that_counts_as_the_bound_is_a_clamp(root: bool) -> None:
    strengths = (0.5, 1.25, 2.5, -1.0, 3.0, 1.75, 4.0)
    points = probes(lambda p: min(p.strength, 1.5) * p.expected / p.strength, strengths=strengths, root=root)
    assert said(diagnose(points)) == ("LH207", None, "strength beyond 1.5")


@pytest.mark.parametrize("root", [False, True])
def test_a_strength_that_is_capped_on_both_sides_is_a_clamp(root: bool) -> None:
    strengths = (0.5, -1.75, 2.5, -1.0, 3.0, 1.75, -4.0)
    points = probes(lambda p: max(-1.5, min(p.strength, 1.5)) * p.expected / p.strength, strengths=strengths, root=root)
    bare = [replace(p, alphas=(None,), ranks=(4,), index=0, root=False) for p in points]
    bare = [replace(p, measured=max(-1.5, min(p.strength, 1.5))) for p in bare]
    for each in (points, points + bare):
        assert said(diagnose(each)) == ("LH207", None, "strength beyond 1.5 or below -1.5, which caps it")


def test_a_law_of_some_values_of_the_strength_is_the_strengths_fault() -> None:
    strengths = (0.5, 1.0, 1.25, 1.5, -1.0, 1.9, 2.0, 2.5, 3.0)
    found = diagnose(probes(lambda p: p.expected * (0.01 if p.strength > 1.8 else 1), strengths=strengths))
    assert (found.code, found.law and found.law.formula) == ("LH207", "0.01 * strength * alpha / rank")
    assert str(found.trait) == "a strength of 1.9 or more (right up to 1.5)"


def of_rank(p: Probe) -> float:
    assert p.alpha is not None
    return p.strength if p.alpha > 4 * p.rank else p.expected


def test_a_number_of_alpha_over_rank_beyond_which_all_is_wrong_is_said() -> None:
    shapes = ((8.0, 4), (32.0, 4), (33.0, 5), (2.5, 6), (12.0, 12), (70.5, 7), (12.0, 4))
    found = diagnose(
        [
            point
            for order in (shapes, (*shapes[2:], *shapes[:2]), (*shapes[3:], *shapes[:3]))
            for point in probes(of_rank, shapes=order)
        ]
    )
    assert said(found) == ("LH205", "strength", "alpha / rank of 6.6 or more (right up to 3)")


def test_a_bound_that_right_values_are_beyond_is_none() -> None:
    points = probes(
        lambda p: p.expected * (0.02 / p.strength if p.strength > 1.8 else 1), strengths=(0.5, 1.0, 2, 3, 4)
    )
    found = diagnose(points)
    assert found.trait is None or "beyond" not in found.trait.text


@pytest.mark.parametrize(("error", "clamped"), [(1.4, True), (1.6, False)])
def test_a_clamp_is_heard_through_noise_of_half_a_tolerance_more(error: float, clamped: bool) -> None:
    first, *rest = [p for p in clamp(5.0, min) if not p.right]
    noisy = replace(first, measured=first.measured + error * first.tolerance)
    found = diagnose([noisy, *rest, *(p for p in clamp(5.0, min) if p.right)])
    assert (str(found.trait) == "alpha beyond 5") is clamped


def test_scales_that_scatter_beyond_a_bound_are_no_clamp() -> None:
    near = {7.0: 5.0, 11.0: 4.6, 9.0: 5.3}
    points = probes(lambda p: p.strength * near.get(p.alpha, p.alpha) / p.rank, shapes=BOUNDED)
    found = diagnose(points)
    assert found.code == "LH205"
    assert found.trait is not None
    assert "beyond" not in found.trait.text


@pytest.mark.parametrize(("bound", "clamped"), [(10.0, False), (8.0, False), (6.0, True)])
def test_one_or_two_values_beyond_a_bound_show_no_clamp(bound: float, clamped: bool) -> None:
    assert ("beyond" in str(diagnose(clamp(bound, min)).trait)) is clamped


def test_a_strength_of_zero_that_changes_something_is_beyond_no_bound() -> None:
    found = diagnose([*clamp(5.0, min), replace(clamp(5.0, min)[2], strength=0.0)])
    assert found.trait is None or "beyond" not in found.trait.text


NOISE = (0.3, 1.9, -0.7, 2.2, 5.0, -3.1, 0.8, 4.4, 1.2, 9.1, 0.1, 7.7)


@pytest.mark.parametrize(("size", "lawful"), [(0.039, False), (0.041, True)])
def test_a_change_too_small_to_measure_has_no_law(size: float, lawful: bool) -> None:
    shapes = ((6.0, 4), (2.75, 12), (0.625, 6), (12.0, 8), (3.5, 7))
    faint = probes(lambda p: size if p.alpha > p.rank else p.expected, shapes=shapes, strengths=[1.0], tolerance=0.01)
    found = diagnose(faint)
    assert (found.law is not None, str(found.trait)) == (lawful, "alpha > rank")


def test_half_of_a_scale_is_large_enough_to_measure() -> None:
    half = diagnose(probes(lambda p: 0.3 * p.expected if p.rank % 2 else p.expected, strengths=[0.25, 0.5]))
    assert said(half) == ("LH209", "0.3 * strength * alpha / rank", "odd rank")


@pytest.mark.parametrize(("size", "trait"), [(0.039, "alpha > rank"), (0.041, None)])
def test_a_right_scale_too_small_to_measure_contradicts_no_trait(size: float, trait: str | None) -> None:
    noise = iter(NOISE * 3)

    def faint_or_wrong(p: Probe) -> float:
        return p.expected if p.alpha <= p.rank or abs(p.expected) < 0.05 else next(noise)

    points = probes(faint_or_wrong, strengths=(1.0, 0.5, -1.0, 2.0, 1.75), tolerance=0.01)
    faint = probes(faint_or_wrong, shapes=((6.0, 4), (2.0, 4)), strengths=[size / 1.5], tolerance=0.01)
    found = diagnose([*points, *faint])
    assert (found.trait and found.trait.text) == trait


def test_many_scattered_changes_too_small_to_measure_have_no_law() -> None:
    points = probes(
        lambda p: 0.035 if (p.index + int(4 * p.strength)) % 3 else p.expected, shapes=[(6.0, 4)] * 7, tolerance=0.01
    )
    assert diagnose(points).law is None


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


@pytest.mark.parametrize(("noise", "heard"), [(0.012, True), (0.02, False)])
def test_the_factor_of_a_block_is_heard_through_noise_within_the_tolerance(noise: float, heard: bool) -> None:
    names = [f"blocks.{i // 3}.{i % 3}" for i in range(6)]

    def noisy(p: Probe) -> float:
        return by_block(0.5, 1.3)(p) + (noise if p.index in (0, 3) and p.strength == 2 else 0)

    found = diagnose(probes(noisy, shapes=SIX, names=names, strengths=[1.0, 2.0], tolerance=0.01))
    assert (said(found) == BLOCKWISE) is heard


@pytest.mark.parametrize(("size", "counted"), [(0.039, False), (0.041, True)])
def test_two_modules_that_can_be_measured_show_the_factor_of_a_block(size: float, counted: bool) -> None:
    shapes = ((10.5, 5), (4 * size, 4), (2.75, 12), (4 * size, 4))
    points = probes(by_block(0.5, 1.3), shapes=shapes, names=NAMES[:4], strengths=[1.0], tolerance=0.01)
    assert (said(diagnose(points)) == BLOCKWISE) is counted


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
    wrong, right = ([p for p in probes(scattered) if p.right is good] for good in (False, True))
    for many, known in ((13, True), (12, True), (11, False)):
        of_many = diagnose([*wrong[:many], *right])
        assert (str(of_many.trait) == "some modules of some files") is known


def test_a_block_without_a_factor_leaves_the_others_without_a_law() -> None:
    def uneven(p: Probe) -> float:
        return by_block(0.5, 1.3, 0.9 if p.index == 4 else 0.7)(p)

    found = diagnose(probes(uneven, shapes=SIX, names=NAMES, strengths=[1.0]))
    assert found.trait is None or found.trait.text != BLOCKWISE[2]


@pytest.mark.parametrize(("other", "apart"), [(1 + 8e-7, False), (1 + 8e-6, True)])
def test_factors_that_differ_in_the_sixth_digit_are_two(other: float, apart: bool) -> None:
    found = diagnose(probes(by_block(0.5, 0.5 * other, 0.5), shapes=SIX, names=NAMES, strengths=[1.0], tolerance=1e-9))
    assert (found.law is not None and bool(found.law.factors)) is apart


def test_one_scale_just_beyond_its_tolerance_is_wrong_by_no_factor_of_its_block() -> None:
    points = probes(lambda p: p.expected + 1.2e-6 * (p.index == 3), shapes=SIX, names=NAMES, strengths=[1.0])
    found = diagnose(points)
    assert found.code is not None
    assert found.trait is None or found.trait.text != BLOCKWISE[2]


def test_what_permuted_files_say_of_places_is_not_heard() -> None:
    right = probes(lambda p: p.expected)
    odd = [replace(p, measured=1.5 * p.expected, permuted=True) for p in right if p.index == 2]
    assert said(diagnose([*right, *odd])) == ("LH209", "1.5 * strength * alpha / rank", "keys permuted")
    assert diagnose([replace(p, permuted=True) for p in right]).code is None


def test_a_fault_of_permuted_files_alone_is_not_said_of_what_all_probes_have() -> None:
    right = probes(lambda p: p.expected, shapes=[(4.0, 8), (4.0, 6)], dtype="bfloat16")
    shapes = [(8.0, 5), (9.0, 7), (6.0, 12)]
    odd = probes(lambda p: p.strength * 8.0 / p.rank, shapes=shapes, permuted=True, dtype="bfloat16")
    found = diagnose([*right, *odd])
    assert said(found) == ("LH204", "strength * alpha(first) / rank", "several alphas in the file")


def test_a_law_that_permuted_files_contradict_is_not_named() -> None:
    ordered = [replace(p, measured=p.strength) for p in probes(lambda p: p.expected, shapes=[(2.0, 4), (8.0, 4)] * 3)]
    mixed = (2.0, 8.0, 5.0)
    exchanged = [
        replace(p, alphas=mixed, ranks=(4, 4, 4), index=i, measured=p.strength * mixed[i - 1] / 4, permuted=True)
        for i in range(3)
        for p in ordered[:4]
    ]
    beside = [replace(p, measured=p.expected) for p in ordered]
    assert diagnose([*ordered, *beside]).code == "LH202"
    assert diagnose([*ordered, *beside, *exchanged]).code != "LH202"


@pytest.mark.parametrize(("bound", "side"), [(lambda r: max(r, 16), "below"), (lambda r: min(r, 16), "above")])
@pytest.mark.parametrize("root", [False, True])
def test_a_bound_on_the_rank_is_named(bound: Callable[[int], int], side: str, root: bool) -> None:
    shapes = [(8.0, 2), (8.0, 4), (4.0, 8), (32.0, 16), (32.0, 20), (16.0, 32), (8.0, 64)]
    files = [[*shapes[n:], *shapes[:n]] for n in range(len(shapes))]
    found = diagnose(
        [p for file in files for p in probes(lambda p: p.scale_of(p.alpha, bound(p.rank)), shapes=file, root=root)]
    )
    assert (found.code, str(found.trait)) == ("LH209", f"a rank {side} 16 counts as 16")


def test_what_permuted_files_contradict_is_not_the_law_of_the_part() -> None:
    """The sign of the first alpha goes for all: where keys are in order the wrong ones happen to have odd ranks."""
    shapes = ((6.0, 4), (-2.75, 5), (3.5, 7), (-9.0, 3), (4.0, 6))
    right = probes(first_sign, shapes=((-6.0, 4), (-8.0, 6)), strengths=[1.0, 0.5])
    there = [*probes(first_sign, shapes=shapes, strengths=[1.0, 0.5]), *right]
    permuted = probes(first_sign, shapes=((-6.0, 4), (2.75, 8), (3.5, 6)), strengths=[1.0, 0.5], permuted=True)
    assert "odd rank" not in str(diagnose(there + permuted).trait)


def first_sign(probe: Probe) -> float:
    return probe.strength * math.copysign(probe.alpha or 0.0, probe.alphas[0] or 0.0) / probe.rank
