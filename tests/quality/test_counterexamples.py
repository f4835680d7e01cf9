"""The counterexample shown is the simplest: one module, the smallest rank and the roundest alpha that still fail."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from harness import check_loader
from harness.checks.run import Limits
from harness.fixtures import fixtures_folder
from harness.selftest.cases import BROKEN

pytestmark = pytest.mark.slow


@cache
def counterexample(name: str) -> dict[str, Any]:
    family, function = name.split(":")
    spec = f"{fixtures_folder() / BROKEN / family}.py:{function}"
    verdicts = check_loader(
        spec, formats=["kohya"], benches=["qwen-image-fused"], max_examples=60, limits=Limits(seconds=5, workers=1)
    )
    found, *others = [verdict for verdict in verdicts if not verdict.ok]
    assert not others
    assert found.counterexample is not None
    return found.counterexample


def shapes(name: str) -> list[tuple[int, float]]:
    return [(module["rank"], module["alpha"]) for module in counterexample(name)["modules"].values()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scale_laws:raw_alpha", [(2, 1.0)]),
        ("subtle:one_per_cent", [(2, 1.0)]),
        ("alpha_values:truncated", [(2, 1.5)]),
        ("alpha_sources:first_alpha", [(2, 1.0), (2, 2.0)]),
        ("subtle:rank_one", [(1, 1.0)]),
        ("subtle:high_rank", [(65, 1.0)]),
        ("subtle:rank_by_three", [(3, 1.0)]),
        ("subtle:mixed_ranks", [(2, 1.0), (1, 1.0)]),
    ],
)
def test_the_smallest_rank_and_the_roundest_alpha_remain(name: str, expected: list[tuple[int, float]]) -> None:
    assert sorted(shapes(name)) == sorted(expected)  # which module has which is as simple either way


@pytest.mark.parametrize("name", ["scale_laws:raw_alpha", "subtle:rank_one", "directions:rows_reversed"])
def test_one_module_of_a_plain_file_at_strength_one_remains(name: str) -> None:
    example = counterexample(name)
    assert len(example["modules"]) == 1
    assert (example["strength"], example["dtype"], example["file_dtype"]) == (1.0, "float32", "float32")
    assert (example["key_seed"], example["seed"]) == (0, 0)


@pytest.mark.parametrize(("name", "strength"), [("strengths:not_negative", -1.0), ("strengths:zero_is_one", 0.0)])
def test_the_plainest_strength_that_fails_remains(name: str, strength: float) -> None:
    assert counterexample(name)["strength"] == strength


def test_the_dtype_remains_only_where_it_matters() -> None:
    assert counterexample("subtle:in_bfloat16")["dtype"] == "bfloat16"
