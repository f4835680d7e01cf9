"""Layers that are not asked: what is known of them is what they would have answered, and whatever is odd is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.benches.layer import Layer, layer_of
from harness.measure import effective
from harness.measure.effective import effective_weights, offsets
from harness.measure.plain import is_plain, torch_is_itself, weight_of

Context = Callable[[nn.Module], AbstractContextManager[object]]


def layer(module: nn.Module) -> Layer:
    found = layer_of(module)
    assert found is not None
    return found


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3, bias=bias, dtype=dtype)


def conv(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(2, 3, (2, 3), **options)


def plain(module: nn.Module, like: torch.Tensor | None = None) -> bool:
    return is_plain(module, layer(module), next(module.parameters()) if like is None else like) and torch_is_itself()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [linear, conv])
def test_what_is_known_of_a_plain_layer_is_what_it_answers(
    make: Callable[..., nn.Module], bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(make(bias=bias).to(dtype))
    layers = {"0": layer(model[0])}
    assert plain(model[0])
    known = *(effective_weights(model, layers, bias=b)["0"] for b in (False, True)), offsets(model, layers)["0"]
    monkeypatch.setattr(effective, "torch_is_itself", lambda: False)
    asked = *(effective_weights(model, layers, bias=b)["0"] for b in (False, True)), offsets(model, layers)["0"]
    for mine, answered in zip(known, asked, strict=True):
        assert mine.dtype == torch.float64
        assert not mine.requires_grad
        assert torch.equal(mine, answered)


def test_what_is_known_is_a_copy() -> None:
    module = linear(torch.float64)
    weight, offset = weight_of(module, layer(module)), offsets(nn.Sequential(module), {"0": layer(module)})["0"]
    weight.zero_()
    offset.zero_()
    assert module.weight.abs().min() > 0
    assert module.bias.abs().min() > 0


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class DoubledTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(torch.Tensor) if func is functional.linear else result


class DoubledWeight(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is functional.linear else result


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) else result


@contextmanager
def hook(module: nn.Module) -> Iterator[None]:
    module.register_forward_hook(lambda module, args, output: 2 * output)
    yield


@contextmanager
def pre_hook(module: nn.Module) -> Iterator[None]:
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    yield


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    old = module.forward
    module.forward = lambda x: 2 * old(x)
    yield


@contextmanager
def other_class(module: nn.Module) -> Iterator[None]:
    module.__class__ = Doubled
    yield


@contextmanager
def other_tensor(module: nn.Module) -> Iterator[None]:
    weight = module.weight.detach().as_subclass(DoubledTensor)
    del module.weight
    module.weight = weight
    yield


@contextmanager
def parametrization(module: nn.Module) -> Iterator[None]:
    parametrize.register_parametrization(module, "weight", DoubledWeight())
    yield


@contextmanager
def patched_class(module: nn.Module) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        old = nn.Linear.forward
        patch.setattr(nn.Linear, "forward", lambda self, x: 2 * old(self, x))
        yield


@contextmanager
def patched_call(module: nn.Module) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "__call__", lambda self, x: 2 * self.forward(x))
        yield


@contextmanager
def patched_function(module: nn.Module) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        old = functional.linear
        patch.setattr(functional, "linear", lambda *args: 2 * old(*args))
        yield


@contextmanager
def hook_on_all(module: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: 2 * output)
    yield
    handle.remove()


@contextmanager
def pre_hook_on_all(module: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: (2 * args[0],))
    yield
    handle.remove()


DOUBLINGS: tuple[Context, ...] = (
    hook, pre_hook, own_forward, other_class, other_tensor, parametrization, patched_class, patched_call,
    patched_function, hook_on_all, pre_hook_on_all, lambda module: FunctionMode(), lambda module: DispatchMode(),
)  # fmt: skip


@pytest.mark.parametrize("doubling", DOUBLINGS)
def test_a_layer_that_is_tampered_with_is_asked(doubling: Context) -> None:
    model = nn.Sequential(linear(bias=False))
    weight, layers = model[0].weight.detach().double(), {"0": layer(model[0])}
    with doubling(model[0]):
        found = effective_weights(model, layers)["0"]
    assert torch.equal(found, 2 * weight)
    assert torch_is_itself()


@pytest.mark.parametrize("doubling", DOUBLINGS)
def test_its_offset_is_asked_for_too(doubling: Context) -> None:
    if doubling in (pre_hook, parametrization, pre_hook_on_all):
        pytest.skip("it leaves the bias alone")
    model = nn.Sequential(linear())
    bias, layers = model[0].bias.detach().double(), {"0": layer(model[0])}
    with doubling(model[0]):
        found = offsets(model, layers)["0"]
    assert torch.equal(found, 2 * bias)


def test_a_convolution_with_a_forward_of_its_own_is_asked() -> None:
    model = nn.Sequential(conv())
    weight, layers, old = model[0].weight.detach().double(), {"0": layer(model[0])}, model[0]._conv_forward
    model[0]._conv_forward = lambda *args: 2 * old(*args)
    assert torch.equal(effective_weights(model, layers)["0"], 2 * weight.flatten(1))


@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"dilation": (2, 1)}, {"padding": (1, 0)}])
def test_a_convolution_whose_geometry_changed_is_not_plain(change: dict[str, tuple[int, int]]) -> None:
    module = conv()
    before = layer(module)
    for name, value in change.items():
        setattr(module, name, value)
    assert not is_plain(module, before, module.weight)


def test_a_convolution_that_mirrors_its_edges_is_not_plain() -> None:
    assert not plain(conv(padding=1, padding_mode="reflect"))


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_numbers_of_another_dtype_than_the_model_are_asked(attribute: str) -> None:
    module = linear()
    setattr(module, attribute, nn.Parameter(getattr(module, attribute).detach().half()))
    assert not plain(module, torch.empty(0))
    with pytest.raises(RuntimeError):
        effective_weights(nn.Sequential(module), {"0": layer(module)})


def test_numbers_on_another_device_are_not_plain() -> None:
    assert not plain(linear(), torch.empty(0, device="meta"))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4), (3, 6), (5, 3), (1, 15)])
def test_a_weight_that_is_not_of_the_layers_shape_is_asked(shape: tuple[int, int]) -> None:
    module = linear(bias=False)
    module.weight = nn.Parameter(torch.zeros(shape))
    assert not plain(module)


def test_layers_of_other_classes_are_not_plain() -> None:
    assert not plain(nn.Embedding(3, 2))
    assert not plain(Doubled(3, 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_known_under_autocast(device: str) -> None:
    with torch.autocast(device, torch.bfloat16) if torch.cuda.is_available() or device == "cpu" else nullcontext():
        assert torch_is_itself() == (device == "cuda" and not torch.cuda.is_available())
