"""Every trait holds exactly where its name says, on both sides of each limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.law.probe import Probe
from harness.law.traits import TRAITS, Trait, borrowed, common_trait, kept_by_rank, one_input_decides

PLAIN = Probe("m", 1.0, 0, (4.0, 2.0), (8, 4), 0.5, 1e-6)


def one(alpha: float | None, rank: int = 8) -> dict[str, Any]:
    return {"alphas": (alpha,), "ranks": (rank,)}


def ranks(*values: int) -> list[dict[str, Any]]:
    return [one(2.0, rank) for rank in values]


def strengths(*values: float) -> list[dict[str, Any]]:
    return [{"strength": value} for value in values]


def places(*indices: int) -> list[dict[str, Any]]:
    return [{"index": i, "alphas": (2.0,) * 4, "ranks": (4,) * 4} for i in indices]


def files(*dtypes: str) -> list[dict[str, Any]]:
    return [{"file_dtype": dtype} for dtype in dtypes]


SOME = {"alphas": (None, 2.0), "ranks": (4, 4)}
# per trait: probes that have it, probes that do not
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "bfloat16": ([{"dtype": "bfloat16"}], [{"dtype": d} for d in ("float16", "float32", "aaa", "zzz")]),
    "float16": ([{"dtype": "float16"}], [{"dtype": d} for d in ("bfloat16", "float32", "aaa", "zzz")]),
    "half precision": ([{"dtype": "float16"}, {"dtype": "bfloat16"}], [{"dtype": "float32"}]),
    "bfloat16 file": (files("bfloat16"), files("float16", "float32", "aaa", "zzz")),
    "float16 file": (files("float16"), files("bfloat16", "float32", "aaa", "zzz")),
    "half-precision file": (files("float16", "bfloat16"), files("float32")),
    "half-precision file in a float32 model": (
        files("float16", "bfloat16"),
        [*files("float32"), {"file_dtype": "float16", "dtype": "float16"}],
    ),
    "file in another dtype than the model": (
        [*files("float16"), {"dtype": "bfloat16"}],
        [*files("float32"), {"file_dtype": "float16", "dtype": "float16"}],
    ),
    "patterns that are ends of names": (
        [{"patterns": "tails"}],
        [{"patterns": p} for p in ("names", "regex", "a", "z")],
    ),
    "patterns that are regular expressions": (
        [{"patterns": "regex"}],
        [{"patterns": p} for p in ("names", "tails", "a", "zzz")],
    ),
    "patterns that are not whole names": ([{"patterns": "tails"}, {"patterns": "regex"}], [{"patterns": "names"}]),
    "negative alpha": ([one(-0.5), one(-9.0)], [one(0.0), one(0.5), one(2.0), one(None)]),
    "alpha = 0": ([one(0.0)], [one(-1.0), one(1.0), one(None)]),
    "no alpha in the file": ([one(None)], [one(2.0), SOME, SOME | {"index": 1}]),
    "no alpha for this module while others have one": ([SOME], [SOME | {"index": 1}, one(None), one(2.0)]),
    "no alpha for this module": ([SOME, one(None)], [SOME | {"index": 1}, one(2.0), one(0.0)]),
    "fractional alpha": ([one(2.5), one(-2.5), one(0.5)], [one(2.0), one(-2.0), one(0.0), one(None)]),
    "0 < alpha < 1": ([one(0.5), one(0.01)], [one(0.0), one(1.0), one(1.5), one(-0.5), one(None)]),
    "alpha > rank": ([one(8.5), one(9.0), one(1.5, 1)], [one(8.0), one(7.0), one(-9.0), one(None), one(None, 1)]),
    "alpha < rank": ([one(7.5), one(0.0), one(-9.0)], [one(8.0), one(9.0), one(None)]),
    "rank = 1": (ranks(1), ranks(2, 3, 64)),
    "rank > 64": (ranks(65, 66, 128), ranks(64, 63, 1)),
    "rank > 32": (ranks(33, 34, 128), ranks(32, 31, 1)),
    "rank > 8 that 8 does not divide": (ranks(9, 12, 20), ranks(1, 4, 8, 16, 64)),
    "rank that 8 does not divide": (ranks(1, 4, 12, 63), ranks(8, 16, 64)),
    "odd rank": (ranks(1, 3, 65), ranks(2, 4, 64)),
    "rank divisible by 3": (ranks(3, 6, 48), ranks(1, 2, 4, 5, 8)),
    "rank divisible by 4": (ranks(4, 8, 20, 48), ranks(1, 2, 3, 5, 6, 10)),
    "several ranks in the file": ([{}, {"ranks": (8, 4, 2), "alphas": (2.0,) * 3}], [one(2.0), *places(0)]),
    "several alphas in the file": ([{}, {"alphas": (1.0, 2.0, 3.0), "ranks": (4,) * 3}], [one(2.0), *places(0)]),
    "one module in the file": ([one(2.0)], [{}, *places(0, 1, 2, 3)]),
    "first module of the file": (places(0), places(1, 2, 3)),
    "last module of the file": ([*places(3), one(2.0), {"index": 1}], places(0, 1, 2)),
    "every second module of the file (1st, 3rd, ...)": (places(0, 2), places(1, 3)),
    "every second module of the file (2nd, 4th, ...)": (places(1, 3), places(0, 2)),
    "square module": ([{"square": True}], [{"square": False}]),
    "rectangular module": ([{"square": False}], [{"square": True}]),
    "merged q/k/v": ([{"fused": True}], [{"fused": False}]),
    "strength = 0": (strengths(0.0), strengths(1.0, -1.0, 0.5)),
    "negative strength": (strengths(-0.5, -1.0), strengths(0.0, 0.5, 1.0)),
    "strength > 1": (strengths(1.5, 2.0, 4.0), strengths(1.0, 0.5, 0.0, -2.0)),
    "strength other than 1": (strengths(0.0, 0.5, 2.0, -1.0), strengths(1.0)),
    "fractional strength": (strengths(0.5, -0.5, 1.75), strengths(0.0, 1.0, -2.0, 4.0)),
    "keys permuted": ([{"permuted": True}], [{"permuted": False}]),
}


@pytest.mark.parametrize("name", TRAITS)
def test_a_trait_holds_where_its_name_says(name: str) -> None:
    having, lacking = CASES[name]
    assert [bool(TRAITS[name](replace(PLAIN, **fields))) for fields in having] == [True] * len(having)
    assert [bool(TRAITS[name](replace(PLAIN, **fields))) for fields in lacking] == [False] * len(lacking)


def at(*values: float) -> list[Probe]:
    return [replace(PLAIN, strength=value, alphas=(2.0,), ranks=(4,)) for value in values]


def test_the_common_trait_is_on_every_wrong_probe_and_on_no_right_one() -> None:
    assert str(common_trait(at(-1.0, -0.5), at(0.0, 1.0, 0.5))) == "negative strength"
    assert str(common_trait(at(1.5, 2.0), at(1.0, 0.5))) == "strength > 1"


def test_a_trait_that_one_right_probe_has_or_one_wrong_probe_lacks_is_not_common() -> None:
    assert common_trait(at(-1.0, 2.0), at(0.0, 3.0, 1.0)) is None
    assert common_trait(at(-1.0, -2.0), at(1.0, -3.0, 0.0, 2.0)) is None


@pytest.mark.parametrize(("wrong", "right"), [([], [1.0]), ([-1.0], []), ([], [])])
def test_without_wrong_or_without_right_probes_nothing_sets_them_apart(wrong: list[float], right: list[float]) -> None:
    assert common_trait(at(*wrong), at(*right)) is None


def met(
    alphas: tuple[float | None, ...], *, times: int = 2, strength: float = 1.0, tolerance: float = 0.0
) -> list[Probe]:
    """Return probes of files of one module: every alpha at as many ranks."""
    return [
        replace(PLAIN, alphas=(alpha,), ranks=(rank,), strength=strength, tolerance=tolerance)
        for alpha in alphas
        for rank in range(2, 2 + times)
    ]


WRONG, RIGHT = (0.0, 0.5, None), (1.0, 2.0, 3.0)


def test_alpha_decides_when_each_of_its_values_is_always_wrong_or_always_right() -> None:
    found = one_input_decides("alpha", met(WRONG), met(RIGHT))
    assert str(found) == "alpha is one of certain values (0, 0.5, none, ..., not 1, 2, 3, ...)"
    assert one_input_decides("alpha", met((*WRONG, 7.0)), met((*RIGHT, 8.0))) == found
    assert one_input_decides("alpha", met(WRONG, times=3), met(RIGHT, times=3)) == found


def test_two_traits_of_alpha_are_told_where_each_wrong_value_has_one_of_them() -> None:
    """`alpha = int(alpha) or rank`: fractions are cut off, and 0 is another alpha."""
    found = one_input_decides("alpha", met((0.0, 1.5, 2.25)), met((1.0, 4.0, 8.0, None)))
    assert str(found) == "alpha = 0 or fractional alpha"
    assert str(one_input_decides("alpha", met((1.5, 2.25, 9.5)), met((1.0, 4.0, 8.0)))) == "fractional alpha"


def test_a_value_that_is_wrong_here_and_right_there_decides_nothing() -> None:
    assert one_input_decides("alpha", met(WRONG), [*met(RIGHT), *met((0.5,), times=1)]) is None


def test_values_met_too_seldom_decide_nothing() -> None:
    assert one_input_decides("alpha", met(WRONG[:2]), met(RIGHT)) is None
    assert one_input_decides("alpha", met(WRONG), met(RIGHT[:2])) is None
    assert one_input_decides("alpha", met(WRONG, times=1), met(RIGHT)) is None
    assert one_input_decides("alpha", 2 * met(WRONG, times=1), met(RIGHT)) is None  # the same inputs again
    assert one_input_decides("alpha", met(WRONG), met(RIGHT, times=1)) is None
    assert one_input_decides("alpha", [], []) is None


def test_a_scale_that_is_right_by_a_coarse_tolerance_says_nothing() -> None:
    coarse = [replace(p, tolerance=0.0011 * p.expected) for p in met(WRONG[1:2])]
    fine = [replace(p, tolerance=0.001 * abs(p.expected)) for p in met(WRONG[1:2], strength=-1.0)]
    assert one_input_decides("alpha", met(WRONG), [*met(RIGHT), *coarse]) is not None
    assert one_input_decides("alpha", met(WRONG), [*met(RIGHT), *fine]) is None


def test_the_strength_decides_in_the_same_way() -> None:
    wrong = [p for strength in (0.25, 0.35, 0.45) for p in met((2.0,), strength=strength)]
    right = [p for strength in (0.2, -0.3, 1.0) for p in met((2.0,), strength=strength)]
    found = one_input_decides("strength", wrong, right)
    assert str(found) == "strength is one of certain values (0.25, 0.35, 0.45, ..., not 0.2, -0.3, 1, ...)"
    assert one_input_decides("alpha", wrong, right) is None


FILE = Probe("m", 2.0, 1, (8.0, 3.0, None), (4, 2, 5), 0.0, 0.01)


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        (8.0, "alpha"),  # 2 * 8 / 2
        (5.0, "alpha"),  # 2 * 5 / 2: without an alpha of its own a module counts as alpha = rank
        (8.009, "alpha"),
        (7.991, "alpha"),
        (1.5, "rank"),  # 2 * 3 / 4
        (1.2, "rank"),  # 2 * 3 / 5
        (8.02, None),
        (-8.0, None),
        (4.0, "alpha / rank"),  # 2 * 8 / 4, both of another module
        (4.1, None),
    ],
)
def test_a_scale_that_another_module_would_have_is_borrowed(measured: float, word: str | None) -> None:
    found = borrowed(6 * [replace(FILE, measured=measured)])
    assert (found and str(found)) == (word and f"two modules of a file differ in {word}")


def test_the_tolerance_itself_is_near_enough() -> None:
    assert borrowed(6 * [replace(FILE, measured=8.25, tolerance=0.25)]) is not None


def test_an_alpha_that_is_borrowed_only_where_a_module_has_none_says_so() -> None:
    lacks = Probe("m", 1.0, 0, (4.0, 2.0, None), (8, 4, 4), 0.25, 1e-6)  # alpha 2 for 4
    whole = replace(lacks, alphas=(4.0, 2.0, 1.0), measured=0.5)
    assert str(borrowed(6 * [lacks], [lacks, whole])).startswith("a module of the file has no alpha")
    assert str(borrowed(6 * [lacks], [lacks])) == "two modules of a file differ in alpha"
    wrong = replace(whole, measured=0.25)
    assert str(borrowed([*6 * [lacks], wrong], [lacks, wrong])) == "two modules of a file differ in alpha"


def test_six_scales_must_be_borrowed_and_all_of_them() -> None:
    like = replace(FILE, measured=8.0)
    assert borrowed(7 * [like]) is not None
    assert borrowed(5 * [like]) is None
    assert borrowed([*6 * [like], replace(FILE, measured=7.0)]) is None
    assert borrowed([*6 * [like], replace(FILE, measured=1.5)]) is None  # now an alpha, now a rank


def test_a_trait_of_no_single_probe_holds_for_none_and_cannot_be_changed() -> None:
    trait = Trait("some modules of some files", "part")
    assert not trait(PLAIN)
    with pytest.raises(AttributeError):
        trait.about = "file"  # type: ignore[misc]


def test_an_alpha_that_is_kept_by_rank_is_that_of_the_last_or_first_of_the_rank() -> None:
    def probes(measured: dict[int, float]) -> list[Probe]:
        file = {"alphas": (4.0, 3.0, 8.0, 5.0), "ranks": (4, 2, 4, 2)}
        wrong = [
            replace(PLAIN, index=i, measured=scale, strength=u, **file) for i, scale in measured.items() for u in (1.0,)
        ]
        return wrong * 6

    last, first = kept_by_rank(probes({0: 2.0, 1: 2.5})), kept_by_rank(probes({2: 1.0, 3: 1.5}))
    assert "last module" in str(last)
    assert "first module" in str(first)
    assert kept_by_rank(probes({0: 2.1})) is None
    assert kept_by_rank(probes({0: 2.0})[:5]) is None


def test_an_alpha_that_a_file_before_had_is_borrowed_from_it() -> None:
    before = [replace(FILE, index=0, alphas=(9.0,), ranks=(FILE.rank,), module=FILE.module, measured=0.0)]
    wrong = [replace(FILE, measured=FILE.scale_of(9.0, FILE.rank), strength=FILE.strength) for _ in range(6)]
    assert str(borrowed(wrong, [*before, *wrong])) == "a file loaded before has another alpha for the module"
    assert borrowed(wrong, [*wrong, *before]) is None
