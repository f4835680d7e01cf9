"""Effective weights are what a module computes, however a loader put the change there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from harness.benches.layer import Layer
from harness.measure.effective import MissingModuleError, effective_weight, effective_weights


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3).to(dtype)


def patched() -> tuple[nn.Module, torch.Tensor]:
    layer = linear()
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    return layer, 2 * layer.weight


def hooked() -> tuple[nn.Module, torch.Tensor]:
    layer = linear()
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer, 2 * layer.weight


def pre_hooked() -> tuple[nn.Module, torch.Tensor]:
    layer = linear()
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer, 2 * layer.weight


def parametrized() -> tuple[nn.Module, torch.Tensor]:
    layer = linear()
    expected = 2 * layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer, expected


def wrapped() -> tuple[nn.Module, torch.Tensor]:
    layer = linear()
    return Wrapper(layer), 2 * layer.weight


@pytest.mark.parametrize("make", [patched, hooked, pre_hooked, parametrized, wrapped])
def test_every_way_of_changing_a_layer_is_seen(make) -> None:
    module, expected = make()
    assert torch.allclose(effective_weight(module, Layer("linear", 3, 5)), expected.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_read_exactly_and_the_bias_left_as_it_was(dtype: torch.dtype) -> None:
    layer = linear(dtype)
    bias = layer.bias.detach().clone()
    assert torch.equal(effective_weight(layer, Layer("linear", 3, 5)), layer.weight.double())
    assert torch.equal(layer.bias, bias)


def test_a_model_inside_a_wrapper_is_found_by_the_end_of_the_path() -> None:
    model = nn.Sequential()
    model.add_module("base_model", nn.ModuleDict({"a": linear()}))
    assert list(effective_weights(model, {"a": Layer("linear", 3, 5)})) == ["a"]


def test_a_missing_layer_and_a_wrong_shape_are_named() -> None:
    with pytest.raises(MissingModuleError, match="gone"):
        effective_weights(nn.Sequential(linear()), {"gone": Layer("linear", 3, 5)})
    with pytest.raises(ValueError, match="should be"):
        effective_weight(linear(), Layer("linear", 4, 5))
