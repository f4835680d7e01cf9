"""Faults that no plain file shows: of a cache, of a strength set later, of how alpha is stored, of what is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import check_loader, loader
from harness.checks.cell import Cell
from harness.checks.plan import Plan
from harness.loaders.registry import resolve

PLACE: dict[str, Any] = {"formats": ["comfyui"], "benches": ["qwen-image"], "variants": ["lora"], "max_examples": 2}
Update = tuple[str, float, torch.Tensor]


def updates(path: Path, *, alpha: Callable[[torch.Tensor], float] = float) -> Iterator[Update]:
    """Yield name, alpha / rank and B @ A of every pair; what has another key is refused."""
    tensors = {key.removeprefix("diffusion_model."): tensor for key, tensor in load_file(path).items()}
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    ends = ("lora_A.weight", "lora_B.weight", "alpha")
    if strange := tensors.keys() - {f"{name}.{end}" for name in names for end in ends}:
        raise NotImplementedError(f"these keys are not supported: {sorted(strange)}")
    for name in sorted(names):
        a, b = (tensors[f"{name}.lora_{half}.weight"].double() for half in "AB")
        found = tensors.get(f"{name}.alpha", torch.tensor(float(len(a))))
        yield name, alpha(found) / len(a), b @ a


@torch.no_grad()
def add(model: torch.nn.Module, name: str, change: torch.Tensor) -> None:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    weight.copy_((weight.double() + change).to(weight.dtype))


def merged(model: torch.nn.Module, path: Path, *, strength: float = 1.0) -> None:
    for name, scale, product in updates(path):
        add(model, name, strength * scale * product)


def codes(load: Callable[..., Any], **place: Any) -> set[str | None]:
    return {verdict.code for verdict in check_loader(load, **(PLACE | place)) if not verdict.ok}


def test_a_loader_that_has_none_of_these_is_right() -> None:
    assert not codes(merged)


def test_a_strength_that_stays_in_a_cache_is_found_in_a_file_that_was_loaded_before() -> None:
    kept: dict[bytes, list[Update]] = {}

    def load(model: torch.nn.Module, path: Path, *, strength: float = 1.0) -> None:
        whole = path.read_bytes()
        if whole not in kept:
            kept[whole] = [(name, 1.0, strength * scale * product) for name, scale, product in updates(path)]
        for name, _, change in kept[whole]:
            add(model, name, change)

    assert codes(load) == {"LH408"}


def test_alphas_that_are_integers_count_too() -> None:
    def load(model: torch.nn.Module, path: Path, *, strength: float = 1.0) -> None:
        for name, scale, product in updates(path, alpha=lambda x: float(x) if x.is_floating_point() else 4.0):
            add(model, name, strength * scale * product)

    assert codes(load) == {"LH202"}


def _setter(seen: Callable[[float, float], float]) -> Callable[..., Any]:
    """Return a right loader whose `set_strength` puts `seen(strength, scale)` in the place of their product."""

    def put(model: Any, strength: float, factor: Callable[[float, float], float]) -> None:
        for name, scale, product in model.loaded:
            model.get_submodule(name).weight.data.copy_(model.before[name] + factor(strength, scale) * product)

    def load(model: Any, path: Path, *, strength: float = 1.0) -> None:
        model.loaded = list(updates(path))
        model.before = {name: model.get_submodule(name).weight.data.clone() for name, _, _ in model.loaded}
        put(model, strength, lambda strength, scale: strength * scale)

    return loader(set_strength=lambda model, strength: put(model, strength, seen))(load)


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        (lambda strength, scale: strength * scale, set()),
        (lambda strength, scale: strength * min(scale, 4.0), {"LH207"}),
        (lambda strength, scale: (strength or 1e-3) * scale, {"LH207"}),
    ],
    ids=["right", "capped", "not quite 0"],
)
def test_a_strength_set_later_is_right_at_every_scale_and_at_0(
    seen: Callable[[float, float], float], found: set[str]
) -> None:
    assert codes(_setter(seen)) == found


@pytest.mark.parametrize(("says", "found"), [(True, set()), (False, {"LH103"})])
def test_a_module_that_is_not_declared_is_not_left_out_in_silence(says: bool, found: set[str]) -> None:
    @loader(modules=r"\.attn\.")
    def load(model: torch.nn.Module, path: Path, *, strength: float = 1.0) -> None:
        for name, scale, product in updates(path):
            if ".attn." in name:
                add(model, name, strength * scale * product)
            elif says:
                print(f"{name}: not supported, left out")

    assert codes(load) == found


def test_of_many_blocks_the_first_and_the_tenth_are_tried_together() -> None:
    cell = Cell(resolve(merged), "comfyui", "qwen-image-deep")
    first, tenth = Plan().layers_in(cell)[:2]
    assert tenth == first.replace(".1.", ".10.")
    assert first != tenth

    def load(model: torch.nn.Module, path: Path, *, strength: float = 1.0) -> None:
        found = list(updates(path))
        for name, _, product in found:
            scale = next(other for key, other, _ in reversed(found) if key.startswith(name.split(".")[0] + ".1"))
            add(model, name, strength * scale * product)

    assert codes(load, benches=["qwen-image-deep"]) & {"LH204", "LH209"}


def test_where_what_was_loaded_before_decides_the_line_to_reproduce_is_the_whole_check() -> None:
    kept: dict[tuple[int, ...], list[Update]] = {}

    def load(model: torch.nn.Module, path: Path, *, strength: float = 1.0) -> None:
        found = list(updates(path))
        for name, scale, product in kept.setdefault(tuple(product.numel() for _, _, product in found), found):
            add(model, name, strength * scale * product)

    verdicts = [verdict for verdict in check_loader(load, **PLACE) if not verdict.ok]
    assert {verdict.code for verdict in verdicts} == {"LH408"}
    for verdict in verdicts:
        assert "loaded first in a fresh process this file is right" in verdict.text()
        assert str(verdict.reproduce).endswith("--format comfyui --bench qwen-image --max-examples 2 --seed 0")


def test_a_fault_of_one_load_is_reproduced_by_that_load() -> None:
    def load(model: torch.nn.Module, path: Path, *, strength: float = 1.0) -> None:
        for name, scale, product in updates(path):
            add(model, name, 2 * strength * scale * product)

    (verdict,) = (verdict for verdict in check_loader(load, **PLACE) if not verdict.ok)
    assert "--strength 1 --dtype float32" in str(verdict.reproduce)
