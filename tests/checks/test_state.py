"""What a load leaves behind: a second file, a second name, an unload, a strength set later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import loader
from harness.checks.cell import Cell
from harness.checks.family import follow
from harness.checks.trial import run_trial
from harness.example import Example, Target
from harness.loaders.registry import resolve
from tests.checks.sample_loaders import pairs

Deltas = dict[str, list[tuple[Any, torch.Tensor]]]


def kept(model: Any) -> Deltas:
    """Return what was loaded so far, by file."""
    files: Deltas = model.__dict__.setdefault("files", {})
    return files


def put(model: torch.nn.Module, lora: Path, strength: float, name: str) -> None:
    kept(model)[name] = [(layer, strength * m.trained_scale * product) for layer, m, product, _ in pairs(model, lora)]
    add(kept(model)[name])
    model.__dict__["strengths"] = strength or 1.0, strength


def add(deltas: list[tuple[Any, torch.Tensor]], times: float = 1.0) -> None:
    for layer, delta in deltas:
        layer.weight.data += times * delta


def take_last(model: torch.nn.Module) -> None:
    add(kept(model).popitem()[1], -1.0)


def multiply_last(model: torch.nn.Module, strength: float) -> None:
    name = list(kept(model))[-1]
    first, now = model.__dict__["strengths"]
    add(kept(model)[name], (strength - now) / first)
    model.__dict__["strengths"] = first, strength


@loader(unload=take_last, set_strength=multiply_last)
def adds(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, strength, f"file {len(kept(model))}")


def takes_the_place(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    while kept(model):
        take_last(model)
    put(model, lora, strength, lora.name)


def takes_the_place_where_both_are(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    new = [id(layer) for layer, *_ in pairs(model, lora)]
    for deltas in kept(model).values():
        add([(layer, delta) for layer, delta in deltas if id(layer) in new], -1.0)
    put(model, lora, strength, lora.name)


def shares_the_strength(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    earlier = list(kept(model).values())
    for deltas in earlier:
        add(deltas, 1 / (len(earlier) + 1) - 1 / len(earlier))
    new = [(layer, strength * m.trained_scale * product) for layer, m, product, _ in pairs(model, lora)]
    kept(model)[f"file {len(earlier)}"] = new
    add(new, 1 / (len(earlier) + 1))


def ignores_the_second(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    if not kept(model):
        put(model, lora, strength, lora.name)


def once_at_any_strength(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    if str(lora) not in kept(model):
        put(model, lora, strength, str(lora))


def by_name(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, strength * (1 if lora.name.startswith("adapter") else 1.2), str(lora))


@loader(unload=take_last)
def scale_compounds(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    model.__dict__["scale"] = strength * model.__dict__.get("scale", 1.0)
    put(model, lora, model.__dict__["scale"], f"file {len(kept(model))}")


@loader(unload=lambda model: [take_last(model) for _ in kept(model).copy() if float(kept_strength(model))])
def zero_stays(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    model.__dict__["zero"] = model.__dict__.get("zero", False) or strength == 0
    put(model, lora, 0.0 if model.__dict__["zero"] else strength, f"file {len(kept(model))}")


_first: dict[str, torch.Tensor] = {}


def remembers_the_base(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    for layer, m, product, _ in pairs(model, lora):
        base = _first.setdefault(names[id(layer)], layer.weight.clone())
        layer.weight.copy_(base + strength * m.trained_scale * product)


def kept_strength(model: Any) -> float:
    return 1.0


@loader(set_strength=lambda model, strength: multiply_last(model, max(strength, 0.1)))
def never_zero(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, strength, lora.name)


@loader(set_strength=lambda model, strength: multiply_last(model, strength**2))
def squares_the_strength(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, strength, lora.name)


def without_sign(model: torch.nn.Module, strength: float) -> None:
    multiply_last(model, abs(strength))


@loader(set_strength=without_sign)
def loses_the_sign(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, strength, lora.name)


def only_positive(model: torch.nn.Module, strength: float) -> None:
    if strength < 0:
        raise ValueError("a strength below zero")
    multiply_last(model, strength)


@loader(set_strength=only_positive)
def refuses_negative(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, strength, f"file {len(kept(model))}")


@loader(set_strength=lambda model, strength: model.no_such_thing)
def cannot_set(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, strength, lora.name)


def codes(load: Callable[..., object]) -> list[str]:
    cell = Cell(resolve(load), "kohya", "qwen-image-fused")
    example = Example(tuple(Target(name, 4, 8.0) for name in cell.targets))
    return [finding.code for finding in follow(cell, run_trial(cell, example), ("float32", "bfloat16"))]


RIGHT = [adds, takes_the_place, refuses_negative]
WRONG = {
    takes_the_place_where_both_are: {"LH405"},
    shares_the_strength: {"LH405"},
    ignores_the_second: {"LH405"},
    once_at_any_strength: {"LH402"},
    by_name: {"LH402"},
    scale_compounds: {"LH403", "LH405"},  # two strengths, one after the other, meet in both
    zero_stays: {"LH403"},
    squares_the_strength: {"LH207"},
    cannot_set: {"LH207"},
    loses_the_sign: {"LH207"},
    remembers_the_base: {"LH402"},
}


@loader(unload=take_last)
def float32_alone(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    if next(model.parameters()).dtype != torch.float32:
        raise RuntimeError("mat1 and mat2 must have the same dtype")
    put(model, lora, strength, f"file {len(kept(model))}")


def test_a_load_that_raises_is_not_the_unloads_fault() -> None:
    assert "LH403" not in codes(float32_alone)


@pytest.mark.parametrize("every", [2, 3, 4, 5])
def test_a_load_that_fails_now_and_then_is_not_the_fault_of_what_follows_it(every: int) -> None:
    calls = iter(range(1, 1000))

    def fails(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        if next(calls) % every == 0:
            raise RuntimeError("the cache is being written")
        put(model, lora, strength, f"file {len(kept(model))}")

    assert set(codes(fails)) <= {"LH901"}  # which the examples find


@pytest.mark.parametrize("load", RIGHT)
def test_both_ways_to_take_a_second_file_are_right(load: Callable[..., object]) -> None:
    assert codes(load) == []


@pytest.mark.parametrize("load", WRONG)
def test_state_that_is_left_behind_is_named(load: Callable[..., object]) -> None:
    assert set(codes(load)) == WRONG[load]
