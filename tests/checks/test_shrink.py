"""Plainer numbers are tried one by one, where Hypothesis's small steps lead nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from harness import check_loader, loader
from harness.checks.cell import Cell
from harness.checks.family import Sighting
from harness.checks.observation import Observation
from harness.checks.search import Search, shrink, simplified
from harness.checks.trial import run_trial
from harness.example import Example, Target
from harness.isolation.calls import Raised
from harness.isolation.limits import Limits
from harness.loaders.registry import resolve
from tests.checks import sample_loaders as loaders


def start(*shapes: tuple[int, float | None]) -> Example:
    return Example(tuple(Target(f"m{i}", rank, alpha) for i, (rank, alpha) in enumerate(shapes)))


def shapes(example: Example) -> list[tuple[int, float | None]]:
    return [(target.rank, target.alpha) for target in example.targets]


Fails = Callable[[Example], bool]


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda e: True, [(2, 1.0)]),
        (lambda e: any(t.rank % 3 == 0 for t in e.targets), [(3, 1.0)]),
        (lambda e: any(t.rank > 40 for t in e.targets), [(48, 1.0)]),
        (lambda e: any(t.alpha != int(t.alpha or 0) for t in e.targets), [(2, 0.5)]),
        (lambda e: any((t.alpha or 0) > t.rank for t in e.targets), [(2, 3.0)]),
        (lambda e: any((t.alpha or 0) < 0 for t in e.targets), [(2, -1.0)]),
        (lambda e: len({t.alpha for t in e.targets}) > 1, [(2, 2.0), (2, 1.0)]),
        (lambda e: len({t.rank for t in e.targets}) > 1, [(1, 1.0), (2, 1.0)]),
    ],
)
def test_the_plainest_example_that_fails_remains(fails: Fails, expected: list[tuple[int, float]]) -> None:
    found = simplified(start((48, 10.375), (63, -7.25)), fails)
    assert fails(found)
    assert sorted(shapes(found)) == sorted(expected)


def test_a_module_without_alpha_stays_without() -> None:
    assert shapes(simplified(start((48, None)), lambda e: True)) == [(2, None)]


def test_an_example_that_nothing_plainer_replaces_is_kept() -> None:
    only = start((33, 5.5), (7, 2.0))
    assert simplified(only, lambda e: e == only) is only


def refuses(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    raise RuntimeError("the server has a time limit")


@pytest.mark.parametrize(("load", "late"), [(loaders.hangs, True), (refuses, False)])
def test_a_call_that_ran_out_of_time_is_told_from_one_that_talks_of_time(load: object, late: bool) -> None:
    cell = Cell(resolve(load), "kohya", "qwen-image", seconds=0.5)  # type: ignore[arg-type]
    raised = run_trial(cell, Example((Target(cell.targets[0], 4, 8.0),))).raised
    assert raised
    assert (raised.code, raised.timed_out) == ("LH901", late)


@pytest.mark.parametrize("late", [True, False])
def test_only_what_ran_out_of_time_is_not_tried_again(late: bool) -> None:
    cell, drawn = Cell(resolve(loaders.right), "kohya", "qwen-image"), []
    finding = Sighting("LH901", Observation(start((2, 1.0)), raised=Raised("LH901", "no time limit", timed_out=late)))
    examples = st.just(Example((Target(cell.targets[0], 4, 8.0),))).map(lambda e: drawn.append(e) or e)
    assert shrink(cell, examples, finding, base_seed=0, tried=Search()) is finding
    assert bool(drawn) is not late


@loader(formats={"peft"}, benches={"qwen-image"}, uniform={"rank", "alpha"})
def no_high_rank(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    found = loaders.only_pairs(lora).modules.values()
    if len({(module.rank, module.alpha) for module in found}) > 1:
        raise RuntimeError("one rank and alpha only")
    if any(module.rank > 16 for module in found):
        raise KeyError("rank too big")
    loaders.right(model, lora, strength=strength)


def test_a_counterexample_has_the_uniform_rank_that_is_declared_and_its_own_exception() -> None:
    verdicts = check_loader(no_high_rank, max_examples=10, limits=Limits(workers=1))
    (found,) = [v for v in verdicts if v.code == "LH901"]
    assert "KeyError: 'rank too big'" in found.title
