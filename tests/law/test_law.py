"""The scaling law is identified from probes alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.law import identify as identify_module
from harness.law.diagnosis import code_of, diagnose
from harness.law.grammar import ALPHA, RANK, STRENGTH, Word
from harness.law.identify import identify
from harness.law.law import Law
from harness.law.probe import Probe

FILES = (
    ((10.5, 2.75, 6.0, 0.625, 6.0, 33.0, 3.5), (5, 12, 4, 6, 4, 24, 7)),
    ((8.0,) * 3, (16,) * 3),
    ((24.0,) * 2, (8,) * 2),
)
STRENGTHS = (1.0, 0.5, -1.0, 2.0, 0.0, 1.75)
Scale = Callable[[float, tuple[float, ...], tuple[int, ...], int], float]


def probes(scale: Scale, *, error: float = 0.0) -> list[Probe]:
    points = []
    for (alphas, ranks), strength in itertools.product(FILES, STRENGTHS):
        for i in range(len(alphas)):
            s = scale(strength, alphas, ranks, i) * (1 + error)
            tolerance = 1e-6 * max(abs(s), abs(strength * alphas[i] / ranks[i]), 0.01)
            points.append(Probe(f"m{i}", strength, i, alphas, ranks, s, tolerance))
    return points


LAWS: dict[str, tuple[Scale, str, str | None]] = {
    "as trained": (lambda u, a, r, i: u * a[i] / r[i], "strength * alpha / rank", None),
    "raw alpha": (lambda u, a, r, i: u * a[i], "strength * alpha", "LH201"),
    "alpha ignored": (lambda u, a, r, i: u, "strength", "LH202"),
    "alpha ignored, divided by rank": (lambda u, a, r, i: u / r[i], "strength / rank", "LH202"),
    "square root of the rank": (lambda u, a, r, i: u * a[i] / r[i] ** 0.5, "strength * alpha / sqrt(rank)", "LH203"),
    "first alpha": (lambda u, a, r, i: u * a[0] / r[i], "strength * alpha(first) / rank", "LH204"),
    "largest rank": (lambda u, a, r, i: u * a[i] / max(r), "strength * alpha / rank(max)", "LH204"),
    "most common alpha": (
        lambda u, a, r, i: u * max(a, key=a.count) / r[i],
        "strength * alpha(most common) / rank",
        "LH204",
    ),
    "integer alpha": (lambda u, a, r, i: u * int(a[i]) / r[i], "strength * trunc(alpha) / rank", "LH205"),
    "alpha at least one": (lambda u, a, r, i: u * max(a[i], 1) / r[i], "strength * max(alpha, 1) / rank", "LH205"),
    "scale twice": (lambda u, a, r, i: u * (a[i] / r[i]) ** 2, "strength * alpha^2 / rank^2", "LH206"),
    "root of the scale": (lambda u, a, r, i: u * (a[i] / r[i]) ** 0.5, "strength * sqrt(alpha) / sqrt(rank)", "LH206"),
    "doubled": (lambda u, a, r, i: 2 * u * a[i] / r[i], "2 * strength * alpha / rank", "LH206"),
    "strength ignored": (lambda u, a, r, i: a[i] / r[i], "alpha / rank", "LH207"),
    "zero means one": (lambda u, a, r, i: (u or 1) * a[i] / r[i], "(strength or 1) * alpha / rank", "LH207"),
    "sign lost": (lambda u, a, r, i: abs(u) * a[i] / r[i], "|strength| * alpha / rank", "LH207"),
    "strength squared": (lambda u, a, r, i: u * u * a[i] / r[i], "strength^2 * alpha / rank", "LH207"),
    "clamped at one": (lambda u, a, r, i: min(u, 1) * a[i] / r[i], "min(strength, 1) * alpha / rank", "LH207"),
    "one per cent": (lambda u, a, r, i: 1.01 * u * a[i] / r[i], "1.01 * strength * alpha / rank", "LH209"),
    "inverted": (lambda u, a, r, i: -u * a[i] / r[i], "-1 * strength * alpha / rank", "LH209"),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_law_behind_the_probes_is_named(name: str) -> None:
    scale, formula, code = LAWS[name]
    law = identify(probes(scale))
    assert law is not None
    assert formula in (law.formula, *law.alternatives)
    assert (None if law.is_trained else code_of(law)) == code


def test_a_law_that_two_formulas_explain_is_called_ambiguous() -> None:
    equal = [p for p in probes(lambda u, a, r, i: u) if p.strength == 1]
    same = [Probe("m", 1.0, 0, (8.0,), (8,), 1.0, 1e-6) for _ in equal]
    law = identify(same)
    assert law is not None
    assert law.ambiguous


def test_scales_that_follow_nothing_have_no_law() -> None:
    assert identify(probes(lambda u, a, r, i: u * a[i] / r[i] + 0.37 * i * i)) is None


def test_a_fault_under_one_condition_is_reported_with_that_condition() -> None:
    wrong_for_odd = probes(lambda u, a, r, i: u * a[i] / r[i] * (1.5 if r[i] % 2 else 1))
    assert str(diagnose(wrong_for_odd).trait) == "odd rank"


ALPHAS, RANKS = (0.0, 0.25, 0.5, 2.5, 3.0, 8.0, -2.0, -0.75), (2, 4, 6, 9, 16, 32, 5, 7)


def turned_probes(scale: Scale) -> list[Probe]:
    """Return probes of files of five modules in which alphas meet many ranks, at strengths with few and many digits."""
    drawn = itertools.product(range(len(ALPHAS)), range(len(RANKS)), (0.5, 1.0, 2.0, 1.0625, -0.1406, 0.33))
    files = [((2 * ALPHAS)[k : k + 5], (2 * RANKS)[m : m + 5], u) for k, m, u in drawn]
    return [
        Probe(f"m{i}", u, i, alphas, ranks, scale(u, alphas, ranks, i), 1e-6)
        for alphas, ranks, u in files
        for i in range(len(alphas))
    ]


BY_INPUT: dict[str, tuple[Scale, str, str]] = {
    "cut, and 0 is none": (
        lambda u, a, r, i: u * (int(a[i]) / r[i] if int(a[i]) else 1.0), "LH205", "alpha = 0 or fractional alpha",
    ),
    "one decimal": (lambda u, a, r, i: round(u, 1) * a[i] / r[i], "LH207", "strength is one of certain values"),
    "median alpha": (
        lambda u, a, r, i: u * sorted(a)[len(a) // 2] / r[i],
        "LH204",
        "two modules of a file differ in alpha",
    ),
    "second rank": (lambda u, a, r, i: u * a[i] / r[1], "LH204", "two modules of a file differ in rank"),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_INPUT)
def test_what_follows_no_law_is_named_by_the_input_it_depends_on(name: str) -> None:
    scale, code, trait = BY_INPUT[name]
    found = diagnose(turned_probes(scale))
    assert (found.code, str(found.trait)[: len(trait)]) == (code, trait)


def test_scales_that_depend_on_no_one_input_are_called_other() -> None:
    found = diagnose(turned_probes(lambda u, a, r, i: u * a[i] / (r[i] + 1)))
    assert (found.code, found.trait) == ("LH209", None)


def test_one_law_behind_scattered_faults_is_named() -> None:
    def scattered(u: float, a: tuple[float, ...], r: tuple[int, ...], i: int) -> float:
        foreign = (i + int(4 * u)) % 3 != 0  # now this module, now that one
        return u * (max(a, key=a.count) if foreign else a[i]) / r[i]

    found = diagnose(probes(scattered))
    assert (found.code, str(found.trait)) == ("LH204", "some modules of some files")
    assert found.law is not None
    assert found.law.formula == "strength * alpha(most common) / rank"


def test_the_strength_on_every_second_module_is_a_strength_fault_of_those_modules() -> None:
    found = diagnose(probes(lambda u, a, r, i: (u if i % 2 else 1) * a[i] / r[i]))
    assert found.code == "LH207"
    assert found.trait is not None


@pytest.mark.parametrize(
    ("name", "use"),
    [("as trained", 1.0), ("raw alpha", 1 / 32), ("alpha ignored", 0.5), ("doubled", 0.5), ("strength ignored", 1.0)],
)
def test_the_prescription_undoes_the_law(name: str, use: float | None) -> None:
    law = identify(probes(LAWS[name][0]))
    assert law is not None
    assert law.prescription([(16.0, 32), (8.0, 16)] if name != "raw alpha" else [(16.0, 32)]) == use


def test_no_single_strength_undoes_a_law_that_differs_between_modules() -> None:
    law = identify(probes(LAWS["alpha ignored"][0]))
    assert law is not None
    assert law.prescription([(16.0, 32), (8.0, 32)]) is None


def test_without_alpha_in_any_file_training_means_scale_one() -> None:
    points = [Probe("m", u, 0, (None,), (r,), u, 1e-6) for u in STRENGTHS for r in (4, 16)]
    law = identify(points)
    assert law is not None
    assert law.is_trained
    assert law.formula == "strength"


@settings(max_examples=12, deadline=None)
@given(
    words=st.tuples(st.sampled_from(STRENGTH), st.sampled_from(ALPHA), st.sampled_from(RANK)),
    constant=st.sampled_from((1.0, 0.5, 1.37)),
)
def test_refuting_on_a_few_probes_loses_no_law(words: tuple[Word, Word, Word], constant: float) -> None:
    points = probes(lambda u, a, r, i: 0.0)
    truth = Law(*words, constant=constant).predict(points)
    points = [replace(p, measured=float(m)) for p, m in zip(points, truth, strict=True)]
    quick = identify(points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identify_module, "_unexplained", lambda laws, wanted: np.zeros(len(laws)))
        assert identify(points) == quick
