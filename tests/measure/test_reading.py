"""Effective weights of every kind of layer, on their own and inside a running model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from harness.benches.layer import Layer, layer_of
from harness.measure.effective import (
    MissingModuleError,
    effective_weight,
    effective_weights,
    offsets,
    weights_while_running,
)


class Transposed(nn.Module):
    """A linear layer that stores its weight as [in, out], as GPT-2's Conv1D does."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, rows)), nn.Parameter(torch.randn(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def layer(module: nn.Module) -> Layer:
    found = layer_of(module)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, 4, (2, 0)])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), ((2, 3), (1, 2)), ((3, 2), (3, 1))])
def test_a_convolution_is_read_exactly_at_every_place_of_its_kernel(
    kernel: int | tuple[int, int], stride: int, padding: int, dilation: int | tuple[int, int]
) -> None:
    conv = nn.Conv2d(2, 3, kernel, stride=stride, padding=padding, dilation=dilation)
    assert torch.equal(effective_weight(conv, layer(conv)), conv.weight.double().flatten(1))
    with_bias = effective_weight(conv, layer(conv), bias=True)
    assert torch.equal(with_bias, torch.cat([conv.weight.flatten(1), conv.bias[:, None]], dim=1).double())


class Watched(nn.Conv2d):
    """A convolution of a class of its own that keeps the sizes of the images it is asked with."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.seen = tuple(input.shape)
        return super().forward(input)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "height"), [(1, 1, 1, 3), (2, 3, 1, 4), (2, 4, 1, 3), (1, 0, 3, 7), (3, 1, 2, 7)]
)
def test_a_convolution_is_asked_with_the_smallest_images(stride: int, padding: int, dilation: int, height: int) -> None:
    conv = Watched(2, 3, 3, stride=stride, padding=padding, dilation=dilation)
    effective_weight(conv, layer(conv))
    assert conv.seen == (2 * 9 + 1, 2, height, height)


@pytest.mark.parametrize(("kernel", "dilation", "size"), [(1, 1, (1, 1)), (3, 1, (3, 3)), ((2, 4), (5, 2), (6, 7))])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 3)])
def test_offsets_are_the_answers_to_nothing(
    kernel: int | tuple[int, int], dilation: int | tuple[int, int], size: tuple[int, int], stride: int, padding: int
) -> None:
    conv = Watched(2, 3, kernel, stride=stride, padding=padding, dilation=dilation, dtype=torch.bfloat16)
    model = nn.ModuleDict(
        {"c": conv, "e": nn.Embedding(7, 3), "t": Transposed(5, 3).bfloat16(), "l": nn.Linear(5, 3).bfloat16()}
    )
    layers = {n: layer(model[n]) for n in "cel"} | {"t": Layer("transposed", 3, 5, bias=True)}
    found = offsets(model, layers)
    assert conv.seen == (1, 2, *size)
    assert set(found) == {"c", "l", "t"}
    for name, value in found.items():
        assert (value.dtype, value.requires_grad) == (torch.float64, False)
        assert torch.equal(value, model[name].bias.detach().double())


def test_an_embedding_is_read_by_its_tokens() -> None:
    table = nn.Embedding(7, 3)
    assert torch.equal(effective_weight(table, layer(table)), table.weight.double().T)
    with_bias = effective_weight(table, layer(table), bias=True)
    assert torch.equal(with_bias, torch.cat([table.weight.double().T, torch.zeros(3, 1).double()], dim=1))


def test_a_transposed_layer_is_read_as_outputs_by_inputs() -> None:
    module = Transposed(5, 3)
    asked = Layer("transposed", 3, 5, bias=True)
    assert torch.equal(effective_weight(module, asked), module.weight.double().T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bias_is_what_a_layer_answers_to_nothing(dtype: torch.dtype) -> None:
    module = nn.Linear(5, 3).to(dtype)
    found = effective_weight(module, layer(module), bias=True)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert torch.equal(found[:, -1], module.bias.double())
    assert torch.equal(found[:, :-1], module.weight.double())


def test_a_bias_of_any_part_of_a_module_is_silent_meanwhile_and_kept() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, dtype=torch.bfloat16)
            self.register_buffer("bias", torch.full((4,), 100.0, dtype=torch.bfloat16))
            self.amount = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.amount * self.inner(x) + self.bias + self.amount

    block = Block()
    inner = block.inner.bias.detach().clone()
    found = effective_weight(block, Layer("linear", 4, 4, bias=True))
    assert torch.allclose(found, block.inner.weight.double(), rtol=0, atol=2**-7)
    assert torch.equal(block.bias, torch.full((4,), 100.0).bfloat16())
    assert torch.equal(block.inner.bias, inner)
    assert block.inner.bias.requires_grad


def test_biases_come_back_when_a_module_raises() -> None:
    module = nn.Linear(5, 3)
    kept = module.bias.detach().clone()
    with pytest.raises(RuntimeError):
        effective_weight(module, Layer("linear", 3, 6))
    assert torch.equal(module.bias, kept)


def test_a_module_without_numbers_is_asked_in_single_precision() -> None:
    seen: list[torch.dtype] = []

    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.dtype)
            return 2 * x

    assert torch.equal(effective_weight(Bare(), Layer("linear", 3, 3)), 2 * torch.eye(3).double())
    effective_weight(Bare(), Layer("linear", 3, 3), torch.empty(0, dtype=torch.float64))
    assert seen == [torch.float32, torch.float64]


def test_whole_numbers_do_not_decide_the_dtype_of_the_inputs() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3, bias=False, dtype=torch.float64)
            frozen = self.weight.detach().clone()
            del self.weight
            self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
            self.register_buffer("weight", frozen)

    module = Counting()
    assert torch.equal(effective_weight(module, Layer("linear", 3, 3)), module.weight)


class Model(nn.Module):
    """Two linear layers; the second only runs when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.blocks = nn.Linear(4, 4), nn.Linear(4, 3), nn.ModuleDict({"one": nn.Linear(4, 2)})
        self.calls = 0

    def forward(self, x: torch.Tensor, *, both: bool = True) -> torch.Tensor:
        self.calls += 1
        x = self.one(x)
        return self.two(x) if both else x


LAYERS = {"one": Layer("linear", 4, 4, bias=True), "two": Layer("linear", 3, 4, bias=True)}


def test_every_layer_is_read_under_its_own_name_in_order() -> None:
    model = Model()
    found = effective_weights(model, dict(reversed(LAYERS.items())) | {"blocks.one": Layer("linear", 2, 4)})
    assert list(found) == ["two", "one", "blocks.one"]
    for name, weight in found.items():
        assert torch.equal(weight, model.get_submodule(name).weight.double())
    biased = effective_weights(model, LAYERS, bias=True)
    assert torch.equal(biased["two"][:, -1], model.two.bias.double())


def test_layers_are_asked_in_the_dtype_of_the_model() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2, dtype=torch.float64), "plain": nn.Identity()})
    assert effective_weights(model, {"plain": Layer("linear", 2, 2)})["plain"].dtype == torch.float64
    seen: list[torch.dtype] = []
    model["plain"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    effective_weights(model, {"plain": Layer("linear", 2, 2)})
    assert seen == [torch.float64]


def test_a_wrapped_model_is_searched_by_the_end_of_the_path_and_the_shortest_one_is_it() -> None:
    wrapped = nn.ModuleDict({"base": Model()})
    found = effective_weights(wrapped, {"two": LAYERS["two"]})
    assert torch.equal(found["two"], wrapped["base"].two.weight.double())
    found = effective_weights(wrapped, {"one": LAYERS["one"]})  # base.one, not base.blocks.one
    assert torch.equal(found["one"], wrapped["base"].one.weight.double())
    with pytest.raises(MissingModuleError, match=r"^one$"):  # base.one or tail.one
        effective_weights(nn.ModuleDict({"base": Model(), "tail": Model()}), {"one": LAYERS["one"]})
    with pytest.raises(MissingModuleError, match=r"^wo$"):  # a part of a name is no path
        effective_weights(wrapped, {"wo": LAYERS["two"]})


class Doubled(Model):
    """Its first layer counts twice, but only while the model itself runs."""

    def forward(self, x: torch.Tensor, *, both: bool = True) -> torch.Tensor:
        with torch.no_grad():
            self.one.weight.mul_(2)
        try:
            return super().forward(x, both=both)
        finally:
            with torch.no_grad():
                self.one.weight.div_(2)


@pytest.mark.parametrize("both", [True, False])
def test_weights_are_read_as_they_are_while_the_model_runs(both: bool) -> None:
    model = Doubled()
    found = weights_while_running(model, LAYERS, lambda m: m(torch.zeros(1, 4), both=both))
    assert list(found) == ["one", "two"]
    assert torch.equal(found["one"], 2 * model.one.weight.double())
    assert torch.equal(found["two"], model.two.weight.double())  # on its own when the run left it out
    assert model.calls == 1
    assert not model.one._forward_pre_hooks


def test_the_bias_of_a_running_model_is_read_too() -> None:
    model = Doubled()
    found = weights_while_running(model, LAYERS, lambda m: m(torch.zeros(1, 4), both=False), bias=True)
    assert torch.equal(found["one"][:, -1], model.one.bias.double())
    assert torch.equal(found["two"][:, -1], model.two.bias.double())


def test_the_first_run_counts_when_a_model_runs_twice() -> None:
    model = Model()

    def run(m: nn.Module) -> None:
        m(torch.zeros(1, 4))
        with torch.no_grad():
            model.one.weight.zero_()
        m(torch.zeros(1, 4))

    before = model.one.weight.detach().clone()
    assert torch.equal(weights_while_running(model, LAYERS, run)["one"], before.double())


def test_a_model_that_raises_is_left_without_hooks() -> None:
    model = Model()
    with pytest.raises(RuntimeError):
        weights_while_running(model, LAYERS, lambda m: m(torch.zeros(1, 5)))
    assert not model.one._forward_pre_hooks
    assert not model.two._forward_pre_hooks


class Answers(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (torch.zeros(6, 4), "(6, 4)"),
        (torch.zeros(5, 3), "(5, 3)"),
        (torch.zeros(6, 3, 1), "(6, 3, 1)"),
        ((torch.zeros(6, 3),), "tuple"),
        (None, "NoneType"),
    ],
)
def test_an_answer_of_another_kind_or_shape_is_named(answer: object, got: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"module answers {got} to 6 inputs, but should be (6, 3)")):
        effective_weight(Answers(answer), Layer("linear", 3, 5))


@pytest.mark.parametrize(("answer", "got"), [(None, "NoneType"), (torch.zeros(19, 3, 2), "(19, 3, 2)")])
def test_a_convolution_that_answers_with_no_image_is_named(answer: object, got: str) -> None:
    asked = layer(nn.Conv2d(2, 3, 3))
    with pytest.raises(ValueError, match=re.escape(f"module answers {got} to 19 inputs, but should be (19, 3)")):
        effective_weight(Answers(answer), asked)


def test_an_embedding_that_answers_with_no_table_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("module answers NoneType to 8 inputs, but should be (8, 3)")):
        effective_weight(Answers(None), Layer("embedding", 3, 7))
