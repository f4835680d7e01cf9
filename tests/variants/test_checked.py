"""Loaders that are wrong on a variant only are found there, and named; right ones are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.checks.run import Limits, check_loader
from harness.files import match_modules, read_lora
from harness.verdict.verdict import Verdict

IN_PROCESS = Limits(workers=0)


def check(load, format: str, bench: str, variant: str) -> list[Verdict]:
    return check_loader(load, formats=[format], benches=[bench], variants=[variant], max_examples=8, limits=IN_PROCESS)


def codes(verdicts: list[Verdict]) -> set[str]:
    return {v.code for v in verdicts if not v.ok and v.code}


def merge(model: torch.nn.Module, lora: Path, factor) -> None:
    """Add factor(module) * B @ A to every layer, whatever its kind."""
    adapter = read_lora(lora)
    names, missing = match_modules(adapter, [name for name, _ in model.named_modules()])
    if missing or adapter.unused_keys or any(set(m.keys) - {"A", "B", "alpha"} for m in adapter.modules.values()):
        raise NotImplementedError("not all of this file can be loaded")
    for name, module in adapter.modules.items():
        a, b = adapter.tensors(name)
        weight = model.get_submodule(names[name]).weight
        product = b.float().flatten(1) @ a.float().flatten(1)
        with torch.no_grad():
            weight.copy_(weight.float() + factor(module) * product.reshape(weight.shape))


def trained(model, lora, *, strength: float = 1.0) -> None:
    merge(model, lora, lambda m: strength * m.trained_scale)


def raw_alpha(model, lora, *, strength: float = 1.0) -> None:
    merge(model, lora, lambda m: strength * (1.0 if m.alpha is None else m.alpha))


def without_root(model, lora, *, strength: float = 1.0) -> None:
    merge(model, lora, lambda m: strength * m.alpha / m.rank)


def spread_over_kernel(model, lora, *, strength: float = 1.0) -> None:
    adapter = read_lora(lora)
    names, _ = match_modules(adapter, [name for name, _ in model.named_modules()])
    for name, module in adapter.modules.items():
        a, b = adapter.tensors(name)
        weight = model.get_submodule(names[name]).weight
        product = (b.flatten(1) @ a.flatten(1).float()).reshape(weight.shape).transpose(-1, -2)
        with torch.no_grad():
            weight.copy_(weight.float() + strength * module.trained_scale * product)


@pytest.mark.parametrize(("variant", "bench"), [("conv", "sd-unet"), ("lora", "clip-text"), ("lora", "flux")])
def test_a_right_loader_is_right_on_every_kind_of_layer(variant: str, bench: str) -> None:
    assert codes(check(trained, "kohya", bench, variant)) == set()


def test_raw_alpha_is_named_on_convolutions() -> None:
    verdicts = check(raw_alpha, "kohya", "sd-unet", "conv")
    assert codes(verdicts) == {"LH201"}
    assert next(v.law.formula for v in verdicts if v.code == "LH201" and v.law) == "strength * alpha"


def test_a_transposed_kernel_is_no_scale_fault() -> None:
    assert codes(check(spread_over_kernel, "kohya", "sd-unet", "conv")) & {"LH301", "LH303", "LH304"}


def test_the_flag_of_rank_stabilised_lora_ignored_is_named() -> None:
    assert codes(check(trained, "peft", "clip-text", "rslora")) == set()
    assert codes(check(without_root, "peft", "clip-text", "rslora")) == {"LH203"}


def stacked(order: tuple[int, ...]):
    """Return a loader that puts q, k and v of the file into the rows of the merged layer in `order`."""

    def load(model, lora, *, strength: float = 1.0) -> None:
        adapter = read_lora(lora)
        layers = dict(model.named_modules())
        for name, module in adapter.modules.items():
            a, b = adapter.tensors(name)
            delta = strength * module.trained_scale * (b.float() @ a.float())
            parent, _, last = name.rpartition(".")
            if last in ("to_q", "to_k", "to_v"):
                weight, part = layers[f"{parent}.to_qkv"].weight, ("to_q", "to_k", "to_v").index(last)
            elif last.startswith("add_") and last.endswith("_proj"):
                weight, part = layers[f"{parent}.add_qkv_proj"].weight, "qkv".index(last[4])
            else:
                weight, part = layers[name].weight, None
            rows = slice(None) if part is None else slice(order[part] * b.shape[0], (order[part] + 1) * b.shape[0])
            with torch.no_grad():
                weight[rows] = (weight[rows].float() + delta).to(weight.dtype)

    return load


def test_split_parts_belong_into_their_rows_of_a_merged_layer() -> None:
    assert codes(check(stacked((0, 1, 2)), "diffsynth", "qwen-image-fused", "qkv-split")) == set()
    assert codes(check(stacked((2, 1, 0)), "diffsynth", "qwen-image-fused", "qkv-split")) & {"LH104", "LH302"}
