"""What the examples with a fault have in common is said only where chance does not explain it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.checks.family import Sighting
from harness.checks.observation import Observation
from harness.checks.search import Search
from harness.example import Example, Target
from harness.measure.compare import Fit
from harness.measure.tolerance import Tolerance

PLAIN = Example((Target("x", 4, 8.0),))
DTYPES = ("float32", "bfloat16", "float16")
EVERY = [
    replace(PLAIN, dtype=model, file_dtype=file, key_seed=seed)
    for model in DTYPES
    for file in DTYPES
    for seed in (0, 1)
]


def searched(*wrong: Example, times: int = 4, drawn: bool = True) -> Search:
    result = Search()
    for example in EVERY * times:
        seen = Observation(example)
        result.add(seen, [], [Sighting("LH304", seen)] if example in wrong else [], drawn=drawn)
    return result


@pytest.mark.parametrize(
    ("fails", "text"),
    [
        (lambda e: e.dtype == "float16", "float16 models"),
        (lambda e: e.dtype != "float32", "bfloat16 or float16 models"),
        (lambda e: e.file_dtype == "bfloat16", "bfloat16 files"),
        (lambda e: e.key_seed == 1, "keys permuted"),
        (lambda e: e.dtype == "float32" and e.file_dtype != "float32", "float32 models and bfloat16 or float16 files"),
        (lambda e: True, ""),
        (lambda e: False, ""),
        (lambda e: e is EVERY[3], "float32 models and bfloat16 files"),
    ],
)
def test_a_condition_is_named_where_it_separates(fails: object, text: str) -> None:
    wrong = [example for example in EVERY if fails(example)]  # type: ignore[operator]
    assert searched(*wrong, times=8).only_where("LH304") == text


@pytest.mark.parametrize(("fails", "text"), [({"float16"}, "float16 models"), ({"float16", "bfloat16"}, "")])
def test_examples_that_nobody_drew_show_a_condition_only_where_each_like_them_is_wrong(
    fails: set[str], text: str
) -> None:
    wrong = [e for e in EVERY if e.dtype == "float16" or (e.dtype in fails and e.file_dtype == "float16")]
    assert searched(*wrong, times=8, drawn=False).only_where("LH304") == text
    assert searched(*wrong, times=8).only_where("LH304")


@pytest.mark.parametrize(("strength", "text"), [(1.0, "a rank of 5 or more (right up to 4)"), (0.0, "")])
def test_a_rank_from_which_on_all_is_wrong_is_named_where_the_change_shows(strength: float, text: str) -> None:
    result = Search()
    for rank in (1, 3, 4, 5, 6, 8) * 2:
        example = replace(PLAIN, targets=(Target("x", rank, 8.0),))
        fit = Fit(1.0, 0.3, 1.0, 1.0, Tolerance(1e-6, 1e-6, "float32"), strength)
        seen = Observation(example, fits={"x": (fit,)})
        result.add(seen, [], [Sighting("LH304", seen, ("x",))] if rank > 4 else [])
    assert result.only_where("LH304") == text


def test_a_rare_fault_has_no_condition() -> None:
    result = searched()
    seen = Observation(EVERY[0])
    result.add(seen, [], [Sighting("LH304", seen)])
    assert result.only_where("LH304") == ""


def test_two_searches_are_counted_as_one() -> None:
    first, second = (searched(*(e for e in EVERY if e.dtype == "float16"), times=n) for n in (1, 3))
    first.join(second)
    assert first.only_where("LH304") == "float16 models"
    assert first.counts == {"LH304": 24}


def test_what_may_be_the_same_fault_under_another_name_counts_as_wrong() -> None:
    result = Search()
    for example in EVERY * 8:
        seen, code = Observation(example), "LH104" if example.dtype == "float32" else "LH306"
        result.add(seen, [], [Sighting(code, seen)])
    assert result.only_where("LH104") == "float32 models"
    assert result.only_where("LH104", ["LH306"]) == ""
