"""The closed forms of the variants agree with PEFT, and with LyCORIS where PEFT has none."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import closed_form as variants
from tests.closed_form import product, scale

RANKS = st.integers(1, 7)
ALPHAS = st.sampled_from([0.5, 1.0, 3.0, 4.0, 11.0])
property_test = settings(max_examples=25, deadline=None)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.shape == exact.shape
    found, exact = found.detach(), exact.detach()
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < 1e-6, error


def merged(layer: nn.Module, config: Any) -> tuple[Any, nn.Module]:
    """Return PEFT's adapted layer with random parameters everywhere, and a merged copy."""
    torch.manual_seed(3)
    model = peft.get_peft_model(Holder(layer), config)
    adapted = model.base_model.model.layer
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "base_layer" not in name:
                parameter.copy_(
                    torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter)
                )
    return adapted, copy.deepcopy(model).merge_and_unload(safe_merge=True).layer


def part(adapted: Any, name: str) -> torch.Tensor:
    found = getattr(adapted, name)["default"]
    return getattr(found, "weight", found).detach()


def lora(rank: int, alpha: float, **options: Any) -> Any:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], **options)


@property_test
@given(RANKS, ALPHAS, st.booleans())
def test_dora_on_a_linear_layer_normalises_the_rows(rank: int, alpha: float, rslora: bool) -> None:
    layer = nn.Linear(5, 6)
    adapted, new = merged(layer, lora(rank, alpha, use_dora=True, use_rslora=rslora))
    delta = scale(alpha, rank, rslora=rslora) * product(part(adapted, "lora_A"), part(adapted, "lora_B"))
    magnitude = part(adapted, "lora_magnitude_vector")
    assert_close(new.weight, variants.dora_weight(adapted.base_layer.weight, delta, magnitude))


@property_test
@given(RANKS, ALPHAS, st.booleans(), st.sampled_from([1, 3]))
def test_convolutions_with_and_without_dora(rank: int, alpha: float, dora: bool, kernel: int) -> None:
    adapted, new = merged(nn.Conv2d(4, 6, kernel), lora(rank, alpha, use_dora=dora))
    delta = scale(alpha, rank) * variants.conv_product(part(adapted, "lora_A"), part(adapted, "lora_B"))
    base = adapted.base_layer.weight
    exact = base.double() + delta
    if dora:
        exact = variants.dora_weight(base, delta, part(adapted, "lora_magnitude_vector"))
    assert_close(new.weight, exact)


@property_test
@given(RANKS, ALPHAS, st.booleans())
def test_embeddings_with_and_without_dora(rank: int, alpha: float, dora: bool) -> None:
    adapted, new = merged(nn.Embedding(9, 4), lora(rank, alpha, use_dora=dora))
    a, b = part(adapted, "lora_embedding_A"), part(adapted, "lora_embedding_B")
    delta, base = scale(alpha, rank) * variants.embedding_product(a, b), adapted.base_layer.weight
    exact = base.double() + delta
    if dora:
        exact = variants.dora_weight(base, delta, part(adapted, "lora_magnitude_vector"), axis=1)
    assert_close(new.weight, exact)


@property_test
@given(RANKS, ALPHAS, st.booleans())
def test_layers_that_store_their_weight_transposed(rank: int, alpha: float, dora: bool) -> None:
    adapted, new = merged(Conv1D(6, 5), lora(rank, alpha, fan_in_fan_out=True, use_dora=dora))
    delta = scale(alpha, rank) * variants.transposed_product(part(adapted, "lora_A"), part(adapted, "lora_B"))
    base = adapted.base_layer.weight
    exact = base.double() + delta
    if dora:
        exact = variants.dora_weight(base, delta, part(adapted, "lora_magnitude_vector"), axis=1)
    assert_close(new.weight, exact)


@property_test
@given(RANKS, ALPHAS)
def test_a_lora_bias_has_the_scale_of_its_pair(rank: int, alpha: float) -> None:
    adapted, new = merged(nn.Linear(5, 6), lora(rank, alpha, lora_bias=True))
    lora_bias = adapted.lora_B["default"].bias.detach()
    assert_close(new.bias, variants.bias_sum(adapted.base_layer.bias, lora_bias, alpha / rank))


def loha_parts(adapted: Any, index: int) -> list[torch.Tensor]:
    cores = getattr(adapted, f"hada_t{index}")
    parts = [part(adapted, f"hada_w{index}_{half}") for half in "ab"]
    return [*parts, cores["default"].detach()] if "default" in cores else parts


@property_test
@given(RANKS, ALPHAS, st.sampled_from(["linear", "conv", "tucker"]))
def test_loha(rank: int, alpha: float, kind: str) -> None:
    layer = nn.Linear(5, 6) if kind == "linear" else nn.Conv2d(4, 6, 3)
    config = peft.LoHaConfig(r=rank, alpha=alpha, target_modules=["layer"], use_effective_conv2d=kind == "tucker")
    adapted, new = merged(layer, config)
    base = adapted.base_layer.weight
    assert (len(loha_parts(adapted, 1)) == 3) == (kind == "tucker")
    delta = variants.loha_product(loha_parts(adapted, 1), loha_parts(adapted, 2), base.shape)
    assert_close(new.weight, base.double() + alpha / rank * delta)


def lokr_parts(adapted: Any, index: int) -> list[torch.Tensor]:
    if "default" in getattr(adapted, f"lokr_w{index}"):
        return [part(adapted, f"lokr_w{index}")]
    parts = [part(adapted, f"lokr_w{index}_{half}") for half in "ab"]
    core = "default" in adapted.lokr_t2 if index == 2 else False
    return [*parts, part(adapted, "lokr_t2")] if core else parts


@property_test
@given(st.integers(1, 3), ALPHAS, st.sampled_from(["linear", "conv", "tucker"]), st.booleans())
def test_lokr(rank: int, alpha: float, kind: str, both: bool) -> None:
    layer = nn.Linear(16, 64) if kind == "linear" else nn.Conv2d(16, 64, 3)
    config = peft.LoKrConfig(
        r=rank, alpha=alpha, target_modules=["layer"], decompose_both=both, use_effective_conv2d=kind == "tucker"
    )
    adapted, new = merged(layer, config)
    base = adapted.base_layer.weight
    delta = variants.lokr_product(lokr_parts(adapted, 1), lokr_parts(adapted, 2), base.shape)
    assert_close(new.weight, base.double() + alpha / rank * delta)


def test_lokr_of_two_full_factors_keeps_pefts_scale() -> None:
    adapted, new = merged(nn.Linear(4, 6), peft.LoKrConfig(r=8, alpha=2, target_modules=["layer"]))
    assert [len(lokr_parts(adapted, index)) for index in (1, 2)] == [1, 1]
    delta = variants.lokr_product(lokr_parts(adapted, 1), lokr_parts(adapted, 2))
    assert_close(new.weight, adapted.base_layer.weight.double() + 0.25 * delta)


def lycoris_module(kind: str, layer: nn.Module, **options: Any) -> Any:
    lycoris = pytest.importorskip("lycoris.modules")
    torch.manual_seed(3)
    module = getattr(lycoris, kind)("x", layer, 1.0, lora_dim=4, alpha=6.0, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("org_module"):
                parameter.copy_(
                    torch.rand_like(parameter) + 0.5 if name == "dora_scale" else torch.randn_like(parameter)
                )
    return module


def lycoris_merged(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module.get_merged_weight()[0].double()


@pytest.mark.parametrize("rslora", [False, True])
def test_lycoris_tucker(rslora: bool) -> None:
    layer = nn.Conv2d(5, 6, 3)
    module = lycoris_module("LoConModule", layer, use_tucker=True, rs_lora=rslora)
    delta = variants.tucker_product(module.lora_down.weight, module.lora_up.weight, module.lora_mid.weight)
    assert_close(lycoris_merged(module), layer.weight.double() + 6.0 / (math.sqrt(4) if rslora else 4) * delta)


@pytest.mark.parametrize(("on_out", "axis"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("layer", [nn.Linear(5, 6), nn.Conv2d(5, 6, 3)])
def test_lycoris_dora_scale_on_either_axis(layer: nn.Module, on_out: bool, axis: int) -> None:
    module = lycoris_module("LoConModule", layer, weight_decompose=True, wd_on_out=on_out)
    assert module.dora_scale.shape[1 - axis] == 1
    delta = 1.5 * variants.conv_product(module.lora_down.weight, module.lora_up.weight)
    exact = variants.dora_weight(layer.weight, delta, module.dora_scale, axis=axis)
    assert_close(lycoris_merged(module), exact.detach())


def lokr(full: bool) -> tuple[Any, torch.Tensor]:
    module = lycoris_module("LokrModule", nn.Linear(64, 256), full_matrix=full)
    second = [module.lokr_w2] if full else [module.lokr_w2_a, module.lokr_w2_b]
    return module, variants.lokr_product([module.lokr_w1], second)


def loha() -> tuple[Any, torch.Tensor]:
    module = lycoris_module("LohaModule", nn.Linear(5, 6))
    first, second = ([getattr(module, f"hada_w{i}_{half}") for half in "ab"] for i in (1, 2))
    return module, variants.loha_product(first, second)


def test_lycoris_scales_loha_and_lokr_once_in_its_forward() -> None:
    module, delta = loha()
    assert_close(module.get_weight(module.shape), 1.5 * delta)
    module, delta = lokr(full=False)
    assert_close(module.get_weight(module.shape), 1.5 * delta)


def test_lycoris_lokr_has_scale_one_when_both_factors_are_full() -> None:
    module, delta = lokr(full=True)
    assert_close(module.get_diff_weight()[0], delta)


@pytest.mark.xfail(reason="LyCORIS 4.1.3 multiplies LoHa and LoKr by alpha / rank twice when it merges", strict=True)
@pytest.mark.parametrize("variant", [loha, lambda: lokr(full=False)], ids=["loha", "lokr"])
def test_lycoris_merges_what_its_forward_computes(variant: Any) -> None:
    module, _ = variant()
    assert_close(module.get_diff_weight()[0], module.get_weight(module.shape).double())


def test_whole_differences_have_the_strength_alone() -> None:
    w, diff = torch.randn(3, 4), torch.randn(12)
    assert_close(variants.full_weight(w, diff, strength=0.5), w.double() + 0.5 * diff.double().reshape(3, 4))
