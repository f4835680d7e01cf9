"""Benches in codes of real libraries: right merges pass in every dtype that the layers run in, wrong ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import UserError, check_loader, loader
from harness.benches import get_bench
from harness.benches.codes import numbers_behind, rounded_to
from harness.files import read_lora
from harness.loaders.benches import bench_name
from tests.checks.sample_loaders import only_pairs

from .conftest import HERE

SCHEMES = ("fp8-scaled", "gguf-q4_0")


def ready(scheme: str) -> str:
    if scheme.startswith("gguf"):
        pytest.importorskip("gguf")
    return bench_name("llama-wide", quantise=scheme)


def into_codes(model: nn.Module, lora: Path, factor: float) -> None:
    adapter = only_pairs(lora)
    for name, module in adapter.modules.items():
        a, b = (part.float() for part in adapter.tensors(name))
        layer: Any = model.get_submodule(name)
        whole = weight_of(layer) + factor * module.trained_scale * (b @ a)
        if hasattr(layer.weight, "quant_type"):
            put_gguf(layer, whole)
        else:
            layer.scale_weight.copy_(whole.abs().max() / 448)
            layer.weight = nn.Parameter(
                (whole / layer.scale_weight.float()).to(layer.weight.dtype), requires_grad=False
            )


def weight_of(layer: Any) -> torch.Tensor:
    if not hasattr(layer.weight, "quant_type"):
        return layer.weight.float() * layer.scale_weight.float()  # type: ignore[no-any-return]
    import gguf

    return torch.from_numpy(gguf.dequantize(numbers_behind(layer.weight).numpy(), layer.weight.quant_type))


def put_gguf(layer: Any, whole: torch.Tensor) -> None:
    import gguf

    stored = torch.from_numpy(gguf.quantize(whole.numpy(), layer.weight.quant_type))
    layer.weight = type(layer.weight)(stored, quant_type=layer.weight.quant_type)


@loader(formats={"peft"}, variants={"lora", "rslora"})
def merges(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    into_codes(model, lora, strength)


@loader(formats={"peft"}, variants={"lora", "rslora"})
def merges_too_much(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    into_codes(model, lora, 1.05 * strength)


@loader(formats={"peft"}, variants={"lora", "dora"})
def without_magnitude(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    adapter = read_lora(lora)
    for name, module in adapter.modules.items():
        a, b = (part.float() for part in adapter.tensors(name))
        layer: Any = model.get_submodule(name)
        put_gguf(layer, weight_of(layer) + strength * module.trained_scale * (b @ a))


def rounding_itself(factor: float, coarse: str) -> Any:
    """Return a loader that makes codes of every layer of the sum, and of a model without a LoRA as well."""

    @loader(formats={"peft"}, variants={"lora", "rslora"}, quantises=True, strength_argument="strength")
    def load(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        adapter = only_pairs(lora)
        if set(adapter.modules) - {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}:
            raise ValueError("a module of the file has no layer here")
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            kept = vars(layer).setdefault("kept", layer.weight.data.float().clone())
            if name in adapter.modules:
                a, b = (part.float() for part in adapter.tensors(name))
                kept += factor * strength * adapter.modules[name].trained_scale * (b @ a)
            layer.weight.data = rounded_to(coarse, kept.double()).to(layer.weight.dtype)

    return load


@pytest.mark.parametrize("coarse", ["int8", "fp8", "nf4"])
def test_a_loader_that_quantises_what_it_merged_is_right_and_a_tenth_too_much_is_found(coarse: str) -> None:
    def codes_of(factor: float) -> set[str | None]:
        verdicts = check_loader(
            rounding_itself(factor, coarse),
            formats=["peft"],
            benches=["llama-wide"],
            variants=["lora"],
            max_examples=12,
            limits=HERE,
        )
        assert {verdict.outcome for verdict in verdicts} <= {"passed", "failed"}
        return {verdict.code for verdict in verdicts if verdict.outcome == "failed"}

    assert codes_of(1.0) == set()
    assert codes_of(1.1) == {"LH209"}


def found(load: Any, scheme: str, variant: str = "lora", examples: int = 8) -> set[str | None]:
    verdicts = check_loader(
        load, formats=["peft"], benches=[ready(scheme)], variants=[variant], max_examples=examples, limits=HERE
    )
    assert any(verdict.check == "scale" for verdict in verdicts)
    return {verdict.code for verdict in verdicts if verdict.outcome in ("failed", "errored")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_right_merge_passes_and_one_in_twenty_too_much_is_found(scheme: str) -> None:
    assert found(merges, scheme) <= {"LH103"}
    assert get_bench(ready(scheme)).dtypes == ("float32", "bfloat16", "float16")
    assert "LH209" in found(merges_too_much, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_peft_beside_the_codes_is_right_in_every_dtype(scheme: str) -> None:
    assert found("peft-runtime", scheme) <= {"LH103"}  # it says nothing of keys without a home


def test_a_magnitude_that_is_left_out_is_not_called_applied() -> None:
    assert "LH304" in found(without_magnitude, "gguf-q4_0", "dora", examples=4)


def test_what_holds_no_layer_of_the_bench_is_one_sentence() -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=r"quantise='gguf-q8_0': its blocks are 32 weights of a row, and no layer's"):
        bench_name("clip-text", quantise="gguf-q8_0")
    with pytest.raises(UserError, match=r"none of the layers that take a LoRA is a torch\.nn\.Linear"):
        bench_name("gpt2", quantise="gguf-q8_0")


def test_weights_of_eight_bit_floats_stay_so_in_every_dtype() -> None:
    bench = get_bench(ready("fp8-scaled"))
    layer = next(name for name, layer in bench.layers.items() if layer.codes)
    for dtype in (torch.float32, torch.bfloat16):
        model = bench.build(dtype)
        assert model.get_submodule(layer).weight.dtype == torch.float8_e4m3fn
        assert model.get_submodule("lm_head").weight.dtype == dtype
        assert list(model.state_dict()) == list(bench.build().state_dict())
