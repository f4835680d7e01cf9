"""What is printed of a law or a condition holds of the counterexample printed beside it, after few examples too."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest

from harness.checks.cell import Cell
from harness.checks.examine import check_cell
from harness.checks.family import Sighting
from harness.checks.observation import Observation
from harness.checks.plan import Plan
from harness.checks.search import Search
from harness.example import Example, Target
from harness.law.diagnosis import Diagnosis, agrees
from harness.law.grammar import ALPHA, RANK, STRENGTH
from harness.law.law import Law
from harness.law.probe import Probe
from harness.law.traits import TRAITS
from harness.loaders.registry import resolve
from harness.verdict.verdict import Verdict
from tests.checks.sample_loaders import loader_with

_SOURCES: dict[str, Callable[[list[float]], float]] = {
    "first": lambda v: v[0],
    "last": lambda v: v[-1],
    "most_common": lambda v: max(dict.fromkeys(v), key=v.count),
    "max": max,
    "min": min,
    "mean": mean,
}
_WORDS: dict[str, Any] = {
    "sqrt": math.sqrt,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "max": max,
    "min": min,
}


def scale_by(verdict: Verdict) -> float:
    """Evaluate the printed formula for the worst module of the printed counterexample."""
    assert verdict.law is not None
    assert verdict.counterexample is not None
    modules = verdict.counterexample["modules"]
    numbers: dict[str, Any] = {"strength": verdict.counterexample["strength"]}
    for name in ("alpha", "rank"):
        numbers[name] = modules[verdict.worst_module][name]
        numbers |= {f"{name}_{k}": pick([m[name] for m in modules.values()]) for k, pick in _SOURCES.items()}
    text = re.sub(r"(alpha|rank)\((\w+)\)", r"\1_\2", verdict.law.formula.replace("most common", "most_common"))
    text = re.sub(r"\|(\w+)\|", r"abs(\1)", text).replace("^", "**")
    return float(eval(text, {**_WORDS, **numbers}))


LARGE_ALPHA = loader_with(lambda u, m, every: u * m.trained_scale * (1.05 if (m.alpha or 0) > 64 else 1))
WIDE_ALPHA = loader_with(lambda u, m, every: u * m.trained_scale * (3 if (m.alpha or 0) > 48 else 1))
FAR_ALPHA = loader_with(lambda u, m, every: u * (min(m.alpha, 60) / m.rank if m.alpha else m.trained_scale))
RANK_BETWEEN = loader_with(lambda u, m, every: u * m.trained_scale * (0.7 if 40 < m.rank < 90 else 1))
MANY_MODULES = loader_with(lambda u, m, every: u * m.trained_scale * (1.1 if len(every) > 6 else 1))


@pytest.mark.parametrize(
    ("load", "examples", "seed"),
    [(LARGE_ALPHA, 30, 1), (WIDE_ALPHA, 5, 2), (FAR_ALPHA, 30, 1), (RANK_BETWEEN, 30, 2), (MANY_MODULES, 5, 1)],
)
def test_no_law_is_printed_that_its_counterexample_contradicts(load: object, examples: int, seed: int) -> None:
    cell = Cell(resolve(load), "kohya", "qwen-image-fused")  # type: ignore[arg-type]
    for verdict in check_cell(cell, Plan(examples, seed)):
        if verdict.ok or verdict.law is None:
            continue
        assert verdict.measured_scale is not None
        assert scale_by(verdict) == pytest.approx(verdict.measured_scale, rel=0.01), verdict.title


def probe(measured: float, alpha: float = 65.0, rank: int = 2) -> Probe:
    return Probe("m", 1.0, 0, (alpha,), (rank,), measured, 1e-4)


TWICE = Law(STRENGTH[0], ALPHA[0], RANK[0], constant=2.0)


@pytest.mark.parametrize(
    ("trait", "measured", "agreed"),
    [
        (None, 65.0, True),
        (None, 34.125, False),
        (None, 32.5, False),  # a law without a condition holds where nothing seems wrong, too
        (TRAITS["alpha > rank"], 65.0, True),
        (TRAITS["alpha > rank"], 32.5, False),
        (TRAITS["rank > 64"], 65.0, False),  # wrong where it is said to be right
        (TRAITS["rank > 64"], 32.5, True),
    ],
)
def test_a_diagnosis_is_held_against_probes(trait: Any, measured: float, agreed: bool) -> None:
    assert agrees(Diagnosis(TWICE, "LH206", trait), [probe(measured)]) is agreed


def test_one_wrong_example_makes_no_condition() -> None:
    result, plain = Search(), Example((Target("x", 4, 8.0),))
    for number in range(20):
        seen = Observation(Example(plain.targets, dtype="float32" if number else "float16", value_seed=number))
        result.add(seen, [], [] if number else [Sighting("LH102", seen)])
    assert result.only_where("LH102") == ""
