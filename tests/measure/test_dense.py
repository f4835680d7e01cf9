"""What layers that are not torch's own answer to dense input: what no identity and no zeros would show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from harness.benches.layer import Layer, layer_of
from harness.measure.effective import DENSE, dense_input, effective_weights, weights_while_running

LINEAR, CONV = Layer("linear", 3, 5), Layer("conv", 3, 18, kernel=(3, 3), stride=(1, 1), padding=(0, 0))


class OwnLinear(nn.Linear):
    """A layer of a class of its own, so that it is asked."""


class OwnConv(nn.Conv2d):
    """A convolution of a class of its own."""


class OwnEmbedding(nn.Embedding):
    """An embedding of a class of its own."""


def answers(module: nn.Module) -> tuple[Layer, dict[str, torch.Tensor]]:
    found, dense = layer_of(module), dict[str, torch.Tensor]()
    assert found is not None
    effective_weights(nn.ModuleDict({"layer": module}), {"layer": found}, dense=dense)
    return found, dense


@pytest.mark.parametrize("layer", [LINEAR, CONV, Layer("transposed", 4, 7)])
def test_dense_input_uses_every_column_and_is_the_same_every_time(layer: Layer) -> None:
    x = dense_input(layer, torch.bfloat16)
    assert x is not None
    assert (x.shape, x.dtype, bool(x.all())) == ((DENSE, layer.columns), torch.bfloat16, True)
    assert len({tuple(row) for row in x.tolist()}) == DENSE
    assert torch.equal(x, dense_input(layer, torch.bfloat16))  # type: ignore[arg-type]


def test_an_embedding_has_no_dense_input() -> None:
    assert dense_input(Layer("embedding", 3, 5), torch.float32) is None
    assert answers(OwnEmbedding(5, 3))[1] == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnLinear(5, 3),
        lambda: OwnLinear(5, 3, bias=False),
        lambda: OwnConv(2, 3, (3, 2), stride=(1, 2), padding=(0, 3), dilation=(2, 1)),
        lambda: OwnConv(2, 3, 1),
    ],
)
def test_a_layer_answers_dense_input_by_its_weight_alone(make: Callable[[], nn.Linear | nn.Conv2d]) -> None:
    torch.manual_seed(0)
    module = make()
    layer, dense = answers(module)
    x = dense_input(layer, torch.float32)
    assert x is not None
    wanted = x.double() @ module.weight.detach().double().flatten(1).T
    assert dense["layer"].dtype == torch.float64
    assert torch.allclose(dense["layer"], wanted, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: OwnLinear(5, 3), lambda: OwnConv(2, 3, 3, padding=1)])
def test_what_is_added_whatever_the_input_is_no_part_of_the_answer(make: Callable[[], nn.Module]) -> None:
    module = make()
    _, without = answers(module)
    module.register_forward_hook(lambda module, args, output: output + 5.0)
    _, within = answers(module)
    assert torch.allclose(within["layer"], without["layer"], atol=1e-5)


def test_sequences_are_asked_in_a_batch_as_a_model_does() -> None:
    module, seen = OwnLinear(5, 3), []
    module.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    answers(module)
    assert seen[:2] == [(4, 2, 5), (1, 1, 5)]  # inputs and zeros by turns, then one input alone


def test_a_layer_that_is_torchs_own_is_not_asked() -> None:
    assert answers(nn.Linear(5, 3))[1] == {}


def test_layers_are_asked_inside_of_a_running_model_too_and_only_on_request() -> None:
    model = nn.Sequential(OwnLinear(5, 3))
    layers = {"0": LINEAR}
    dense: dict[str, torch.Tensor] = {}
    run = lambda model: model(torch.ones(1, 5))  # noqa: E731
    found = weights_while_running(model, layers, run, dense=dense)
    x = dense_input(LINEAR, torch.float32)
    assert x is not None
    assert torch.allclose(dense["0"], x.double() @ found["0"].T, atol=1e-6)
    assert torch.equal(weights_while_running(model, layers, run)["0"], found["0"])
