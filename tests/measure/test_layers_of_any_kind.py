"""Convolutions of one and three dimensions, and layers whose weight is codes, are read as what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.benches.layer import Layer, layer_of
from harness.benches.quantise import codes_of, rounded_to
from harness.measure.compare import coarser, fit, low_rank, norm
from harness.measure.effective import dense_input, effective_weight, is_plain, keep_dense

CONVOLUTIONS = (
    nn.Conv1d(3, 5, 4, stride=2, padding=1),
    nn.Conv1d(3, 5, 3, padding="same", dilation=2),
    nn.Conv1d(4, 4, 2, padding="valid"),
    nn.Conv2d(3, 4, 3, padding="same"),
    nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
    nn.Conv3d(2, 4, 1),
)


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=repr)
def test_a_convolution_is_read_in_any_dimension(module: nn.Module) -> None:
    module.requires_grad_(False)
    layer = layer_of(module)
    assert layer is not None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    assert layer.shape == tuple(weight.flatten(1).shape)
    assert torch.equal(effective_weight(module, layer), weight.flatten(1).double())
    assert is_plain(module, layer, torch.zeros(1))


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=repr)
def test_dense_input_meets_all_of_the_kernel(module: nn.Module) -> None:
    module.requires_grad_(False)
    layer = layer_of(module)
    assert layer is not None
    answers: dict[str, torch.Tensor] = {}
    keep_dense(answers, "it", module, layer, torch.zeros(1))
    x = dense_input(layer, torch.float32)
    assert x is not None
    assert norm(answers["it"] - x.double() @ effective_weight(module, layer).T) < 1e-5 * norm(answers["it"])


def test_grouped_and_transposed_convolutions_are_no_layers() -> None:
    assert layer_of(nn.Conv1d(4, 4, 3, groups=4)) is None
    assert layer_of(nn.ConvTranspose1d(4, 4, 3)) is None


def test_an_ordinary_weight_has_no_codes() -> None:
    assert codes_of(nn.Linear(4, 4)) == codes_of(nn.Linear(4, 4).half()) == ""


@pytest.mark.parametrize("codes", ["nf4", "fp4", "int8"])
def test_rounding_to_codes_is_near_and_done_once(codes: str) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).double()
    once = rounded_to(codes, weight)
    assert 0 < norm(once - weight) < (0.02 if codes == "int8" else 0.2) * norm(weight)
    assert torch.allclose(rounded_to(codes, once), once)
    assert torch.equal(rounded_to(codes, torch.zeros(3, 5).double()), torch.zeros(3, 5).double())


@pytest.mark.parametrize(("times", "right"), [(1.0, True), (2.0, False), (0.5, False)])
def test_a_merge_into_codes_is_right_and_a_wrong_scale_still_shows(times: float, right: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    base = rounded_to("nf4", torch.randn(64, 64, generator=generator).double())
    direction = low_rank(torch.randn(4, 64, generator=generator) / 8, torch.randn(64, 4, generator=generator) / 2)
    after = rounded_to("nf4", base + times * direction.product)
    strict = fit(base, after, direction, expected=1.0, dtype="float32")
    assert not strict.direction_right
    (seen,) = coarser((strict,), "nf4", base, direction, (slice(0, 64),))
    assert seen.direction_right
    assert seen.scale_right is right


def test_a_layer_left_out_of_codes_is_seen() -> None:
    generator = torch.Generator().manual_seed(3)
    base = rounded_to("int8", torch.randn(32, 48, generator=generator).double())
    direction = low_rank(torch.randn(2, 48, generator=generator) / 8, torch.randn(32, 2, generator=generator))
    strict = fit(base, base, direction, expected=1.0, dtype="float32")
    (seen,) = coarser((strict,), "int8", base, direction, (slice(0, 32),))
    assert seen.unchanged
    assert not seen.scale_right


def test_a_layer_says_what_it_is() -> None:
    assert layer_of(nn.Conv1d(3, 5, 3)) == Layer("conv", 5, 9, True, (3,), (1,), (0,), (1,))
