"""The law is found by its simplicity among those that explain every probe, within tolerance and no further."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from harness.law.grammar import SOURCES, STRENGTH
from harness.law.identify import _Columns, _unexplained, identify
from harness.law.law import Law
from harness.law.probe import Probe

Alphas, Ranks = tuple[float | None, ...], tuple[int, ...]
TOLERANCE = 1e-6
FILES: tuple[tuple[Alphas, Ranks], ...] = (((6.0, 1.5, 10.0), (4, 12, 5)), ((0.0, 3.0, 8.0, 3.0), (16, 2, 6, 2)))
STRENGTHS = (1.0, 0.5, -2.0, 0.0)


def file_of(alphas: Alphas, ranks: Ranks, scale: Callable[[float, int], float]) -> list[Probe]:
    """Probe one file: `scale(strength, index)` is measured."""
    places = range(len(alphas))
    return [Probe(f"m{i}", u, i, alphas, ranks, scale(u, i), TOLERANCE) for u in STRENGTHS for i in places]


def probes(scale: Callable[[float, list[float], Ranks, int], float]) -> list[Probe]:
    found = []
    for alphas, ranks in FILES:
        numbers = [a or 0.0 for a in alphas]
        found += file_of(alphas, ranks, lambda u, i, a=numbers, r=ranks: scale(u, a, r, i))  # type: ignore[misc]
    return found


def once(strength: float, alpha: float | None, rank: int, measured: float, tolerance: float = TOLERANCE) -> Probe:
    return Probe("m", strength, 0, (alpha,), (rank,), measured, tolerance)


def of(found: Law | None) -> Law:
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("scale", "formula"),
    [
        (lambda u, a, r, i: u * a[i] / r[i], "strength * alpha / rank"),
        (lambda u, a, r, i: u * a[i], "strength * alpha"),
        (lambda u, a, r, i: u / r[i], "strength / rank"),
        (lambda u, a, r, i: u, "strength"),
        (lambda u, a, r, i: a[i] / r[i], "alpha / rank"),
        (lambda u, a, r, i: u * a[i] / r[0], "strength * alpha / rank(first)"),
        (lambda u, a, r, i: u * a[-1] / r[i], "strength * alpha(last) / rank"),
        (lambda u, a, r, i: u * min(a) / r[i], "strength * alpha(min) / rank"),
        (lambda u, a, r, i: u * sum(a) / len(a) / r[i], "strength * alpha(mean) / rank"),
        (lambda u, a, r, i: u * a[0] / max(r), "strength * alpha(first) / rank(max)"),
        (lambda u, a, r, i: -0.75 * u * a[i] / r[i], "-0.75 * strength * alpha / rank"),
        (lambda u, a, r, i: 1.37 * u * u * a[i] / r[i], "1.37 * strength^2 * alpha / rank"),
    ],
)
def test_one_law_explains_separated_probes(scale: Callable[..., float], formula: str) -> None:
    found = of(identify(probes(scale)))
    assert found.formula == formula
    assert found.alternatives == ()
    assert not found.ambiguous
    assert found.is_trained is (formula == "strength * alpha / rank")


@pytest.mark.parametrize(
    ("probe", "first", "others"),
    [
        # rank = alpha hides whether either is read
        (once(1, 16, 16, 1.0), "strength * alpha / rank", {"strength"}),
        (once(1, 1, 16, 0.0625), "strength * alpha / rank", {"strength / rank"}),
        (once(1, 5, 1, 5.0), "strength * alpha / rank", {"strength * alpha", "strength * alpha / sqrt(rank)"}),
        (once(1, 4, 16, 0.25), "strength * alpha / rank", {"strength / sqrt(rank)"}),
        # the factor 4 at strength 4, alpha 2, rank 4 may be a constant, the strength or the rank; two steps it is not
        (once(4, 2, 4, 8.0), "4 * strength * alpha / rank", {"strength^2 * alpha / rank", "strength * alpha"}),
    ],
)
def test_probes_that_fit_several_laws_leave_them_all_named(probe: Probe, first: str, others: set[str]) -> None:
    found = of(identify([probe] * 2))
    assert found.formula == first
    assert set(found.alternatives) == others
    assert len(found.alternatives) == len(others)
    assert found.ambiguous


@pytest.mark.parametrize(
    ("probe", "first", "others"),
    [
        (once(1, 4, 8, 0.25), "0.5 * strength * alpha / rank",
         {"strength * alpha^2 / rank^2", "strength * sqrt(alpha) / rank"}),
        (once(1, 3, 16, math.sqrt(3 / 16)), "2.309 * strength * alpha / rank", {"strength * sqrt(alpha) / sqrt(rank)"}),
        (once(0.25, 5, 8, 0.78125), "5 * strength * alpha / rank",
         {"(1 + strength) * alpha / rank", "strength * alpha^2 / rank"}),
        (once(0.5, 5, 8, 0.21875), "0.7 * strength * alpha / rank", set()),
        # a constant is found before the words that cost as much
        (once(1, -4, 2, 2.0), "-1 * strength * alpha / rank", {"strength * |alpha| / rank"}),
    ],
)  # fmt: skip
def test_a_wrong_scale_of_one_shape_is_read_in_every_way_that_is_met(
    probe: Probe, first: str, others: set[str]
) -> None:
    found = of(identify([probe] * 2))
    assert (found.formula, set(found.alternatives)) == (first, others)


@pytest.mark.parametrize(
    ("probe", "first", "others"),
    [
        (once(1, 5, 8, 0.625), "strength * alpha / rank",
         {"0.3536 * strength * alpha / sqrt(rank)", "alpha / rank", "strength^2 * alpha / rank"}),
        (once(0.25, 5, 8, 0.1625), "1.04 * strength * alpha / rank", {"0.3677 * strength * alpha / sqrt(rank)"}),
    ],
)  # fmt: skip
def test_a_wrong_scale_of_a_stabilised_file_is_read_as_a_part_of_its_own_too(
    probe: Probe, first: str, others: set[str]
) -> None:
    found = of(identify([replace(probe, root=True)] * 2))
    assert (found.formula, set(found.alternatives)) == (first, others)


def test_one_probe_is_enough_to_look_for_a_law() -> None:
    assert of(identify([once(1, 16, 8, 2.0)])).formula == "strength * alpha / rank"


def test_training_within_its_tolerance_comes_before_a_nearer_fraction() -> None:
    assert of(identify([once(1, 16, 16, 1.08, tolerance=0.06)] * 2)).constant == 1.0


def test_a_scale_near_nothing_is_that_scale_and_not_zero() -> None:
    assert of(identify([once(1, None, 4, 1.2e-6)] * 2)).constant == pytest.approx(1.2e-6, rel=1e-9)


def test_files_without_alpha_leave_nothing_open_about_alpha() -> None:
    rank_one = [once(u, None, 1, u) for u in (0.5, -1.0, 2.0)]
    assert of(identify(rank_one)).formula == "strength"
    assert "alpha" not in "".join(of(identify(rank_one)).alternatives)
    divided = [once(u, None, r, u / r) for u in (0.5, -1.0, 2.0) for r in (2, 5)]
    assert of(identify(divided)).formula == "strength / rank"
    assert not of(identify(divided)).is_trained


def test_modules_without_alpha_are_left_out_where_others_have_one() -> None:
    right = probes(lambda u, a, r, i: u * a[i] / r[i])
    strange = file_of((None, 3.0), (4, 8), lambda u, i: 77.0)
    assert of(identify(strange + right)).is_trained


def test_a_mixed_file_is_read_by_its_modules_with_alpha_when_there_is_no_other() -> None:
    mixed = file_of((None, 3.0, 5.0), (4, 8, 9), lambda u, i: 77.0 if i == 0 else u * (None, 3.0, 5.0)[i])  # type: ignore[operator]
    assert of(identify(mixed)).formula == "strength * alpha"


def test_the_alpha_of_another_module_can_stand_for_a_missing_one() -> None:
    files: tuple[tuple[Alphas, Ranks, float], ...] = (
        ((None, 3.0, 5.0), (4, 8, 9), 3.0),
        ((None, 7.0, 6.0), (5, 2, 2), 7.0),
    )
    points = [
        Probe("m", u, 0, alphas, ranks, u * first, TOLERANCE) for u in STRENGTHS for alphas, ranks, first in files
    ]
    assert of(identify(points)).formula == "strength * alpha(first)"


def test_without_probes_and_with_zeros_alone_there_is_no_law() -> None:
    assert identify([]) is None
    assert identify([once(u, None, r, 0.0) for u in (0.0, 0.5, 1.0) for r in (2, 3)]) is None
    assert identify([once(0.0, None, r, 0.0) for r in (2, 3)]) is None


def test_an_alpha_of_zero_is_a_number_like_any_other() -> None:
    points = [once(u, alpha, 4, u * alpha / 4) for u in (1.0, 2.0, -0.5) for alpha in (0.0, 6.0, 1.5)]
    assert of(identify(points)).formula == "strength * alpha / rank"
    as_one = [replace(p, measured=p.strength / 4) if p.alpha == 0 else p for p in points]
    assert of(identify(as_one)).formula != "strength * alpha / rank"


@pytest.mark.parametrize("error", [1.4, -1.4, 0.5])
def test_half_a_tolerance_beyond_the_edge_is_still_explained(error: float) -> None:
    points = [once(1.0, None, 4, 1 + error * TOLERANCE), once(1.0, None, 4, 1 - error * TOLERANCE)]
    found = of(identify(points))
    assert (found.formula, found.constant) == ("strength", 1.0)
    assert found.residual == pytest.approx(abs(error) * TOLERANCE, rel=1e-6)


def test_more_than_that_is_not_explained_by_anything() -> None:
    assert identify([once(1.0, None, 4, 1 + e * TOLERANCE) for e in (1.6, -1.6)]) is None


def test_alternatives_may_be_as_far_off_as_laws() -> None:
    def others(error: float) -> tuple[str, ...]:
        return of(identify([once(1.0, 16.0, 16, 1.0), once(1.0, 16.0, 16, 1 + error * TOLERANCE)])).alternatives

    assert others(1.4) == others(-1.4) == ("strength",)
    # here alpha / rank is 1 + 1e-6, so that `strength` is off by more than the trained law
    off = [once(1.0, 16 + 16e-6, 16, 1 + 1e-6 + e * TOLERANCE) for e in (0.4, 0.6)]
    assert of(identify(off)).alternatives == ()


def test_of_equally_simple_laws_the_closest_comes_first() -> None:
    u = -1 - 4e-7
    found = of(identify([once(u, None, 4, -u), once(1.0, None, 4, 1.0)]))
    assert found.formula == "|strength|"
    assert set(found.alternatives) == {"1", "strength^2"}
    assert found.residual == 0.0


@pytest.mark.parametrize("bottom", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("top", [1, 11, 12])
def test_a_measured_constant_is_read_as_the_simple_fraction_it_stands_for(top: int, bottom: int) -> None:
    simple = top / bottom
    if simple == 1:
        return
    found = of(identify([once(u, None, r, -u * simple * (1 + 3e-8)) for u in (1.0, -3.0) for r in (2, 5)]))
    assert (found.formula, found.constant) == (f"{-simple:.4g} * strength", -simple)


@pytest.mark.parametrize("constant", [13.0, 14.0, 11 / 5, 11 / 7, 11 / 9, 13 / 8])
def test_a_constant_that_is_no_simple_fraction_is_reported_as_measured(constant: float) -> None:
    measured = constant * (1 + 3e-8)
    found = of(identify([once(u, None, r, u * measured) for u in (1.0, -3.0) for r in (2, 5)]))
    assert found.constant == pytest.approx(measured, rel=1e-12)


@pytest.mark.parametrize("t", [1e-3, 0.3])
def test_the_constant_is_the_weighted_least_squares_one(t: float) -> None:
    # weights 1 / t^2: bases 1, 2 and tolerances t, 2t give (1 m1 + 2 m2 / 4) / (1 + 4 / 4)
    points = [once(1.0, None, 4, 13.37 + t, t), once(2.0, None, 4, 26.74 - t, 2 * t)]
    found = of(identify(points))
    assert found.constant == pytest.approx(13.37 + t / 4, rel=1e-12)
    assert found.residual == pytest.approx(1.5 * t, rel=1e-9)


def test_a_half_precision_probe_does_not_blur_what_single_precision_tells() -> None:
    points = [once(1.0, None, 4, 1.2345678, 1e-7), once(2.0, None, 4, 2.4691356 + 0.01, 0.02)]
    assert of(identify(points)).constant == pytest.approx(1.2345678, rel=1e-9)


def test_files_that_say_they_are_stabilised_are_trained_with_the_root() -> None:
    points = [replace(p, root=True) for p in probes(lambda u, a, r, i: u * a[i] / r[i] ** 0.5)]
    found = of(identify(points))
    assert found.formula == "strength * alpha / sqrt(rank)"
    assert found.is_trained
    assert not of(identify([replace(points[0], root=False), *points[1:]])).is_trained


FAR = (((6.0, 1.5, 10.0), (4, 12, 5)), ((2.5, 3.0, 8.0, 3.0), (16, 2, 6, 3)))


def far(scale: Callable[[float, Alphas, Ranks, int], float]) -> list[Probe]:
    return [
        Probe("m", u, i, a, r, scale(u, a, r, i), 1e-9) for a, r in FAR for u in (1.0, 0.5, -2.0) for i in range(len(a))
    ]


def test_five_steps_from_training_are_believed_and_six_are_not() -> None:
    five = far(lambda u, a, r, i: (1 + u) / a[i])  # type: ignore[operator]
    assert of(identify(five)).formula == "(1 + strength) * alpha^-1"
    six = far(lambda u, a, r, i: (1 + u) / a[0])  # type: ignore[operator]
    assert identify(six) is None


def test_loose_tolerances_leave_the_constant_as_it_is() -> None:
    points = [replace(p, measured=100 * p.measured, tolerance=2.0) for p in probes(lambda u, a, r, i: u * a[i] / r[i])]
    found = of(identify(points))
    assert found.formula == "100 * strength * alpha / rank"


def test_what_a_law_leaves_is_what_its_best_constant_leaves() -> None:
    laws = np.array([[1.0, 0.0], [0.0, 0.0], [6.0, 8.0], [4.0, -3.0], [2.0, 1.0], [math.nan, 1.0], [0.03, 0.0]])
    left = _unexplained(laws, np.array([3.0, 4.0]))
    assert left == pytest.approx([16, 25, 0, 25, 25 - 10**2 / 5, 25, 16], abs=1e-9)
    assert math.isnan(_unexplained(np.array([[math.inf, 1.0]]), np.array([3.0, 4.0]))[0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e9])
def test_rounding_leaves_nothing_of_a_law_that_is_right(size: float) -> None:
    wanted = size * np.array([1 / 3, 1 / 7, -1 / 11])
    left = _unexplained(1.1 * wanted[None], wanted)[0]
    assert -1e-11 * size**2 < left < 0


def test_words_are_tried_by_their_cost_each_once() -> None:
    lenient = _Columns([replace(p, measured=0.0, tolerance=1e9) for p in far(lambda u, a, r, i: 0.0)])
    costs = Counter()
    for cost in range(12):
        for strength, (alpha, a_source), (rank, r_source) in lenient.possible(cost):
            assert Law(strength, alpha, rank, a_source, r_source).cost == cost
            costs[cost] += 1
    sourced = 1 + len(SOURCES)
    assert sum(costs.values()) == len(STRENGTH) * (1 + 13 * sourced) * (1 + 5 * sourced)
    assert (costs[0], max(costs)) == (1, 7)


@pytest.mark.parametrize("count", [2, 47, 48, 200])
def test_a_law_at_the_edge_of_every_tolerance_is_possible(count: int) -> None:
    edge = [once(1.0, None, 4, 1 + (-1) ** i * 1.45e-3, 1e-3) for i in range(count)]
    assert of(identify(edge)).formula == "strength"


def test_so_is_one_at_the_edge_of_many_that_differ() -> None:
    strengths = [1 + i / 7 for i in range(48)]
    edge = [once(u, None, 4, u + (-1) ** i * 1.495e-3, 1e-3) for i, u in enumerate(strengths)]
    assert of(identify(edge)).formula == "strength"


def test_few_laws_are_fitted_to_every_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []
    monkeypatch.setattr(_Columns, "fit", lambda self, law: fitted.append(law))
    draw = np.random.default_rng(0)
    assert identify(far(lambda u, a, r, i: float(draw.normal()))) is None
    assert not fitted
    right = far(lambda u, a, r, i: u * a[i] / r[i])  # type: ignore[operator]
    assert identify([*right[:-1], replace(right[-1], measured=77.0)]) is None
    assert not fitted
