"""Convolutions of one and three dimensions, and layers whose weight is codes, are read as what they compute."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from harness.benches.codes import codes_of, rounded_to
from harness.benches.layer import Layer, layer_of
from harness.measure.compare import Fit, low_rank, norm
from harness.measure.effective import dense_input, effective_weight, keep_dense
from harness.measure.plain import is_plain
from harness.variants import Update, get_variant

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


class Positions(nn.Embedding):
    """An embedding that finds its own tokens, as those of positions do."""

    def forward(self, mask: torch.Tensor, past: int = 0) -> torch.Tensor:  # type: ignore[override]
        return super().forward(mask.cumsum(1) + past)


def test_an_embedding_that_is_not_asked_for_tokens_is_no_layer() -> None:
    assert layer_of(Positions(8, 4)) is None
    assert layer_of(nn.Embedding(8, 4)) == Layer("embedding", 4, 8)


def test_an_ordinary_weight_has_no_codes() -> None:
    assert codes_of(nn.Linear(4, 4)) == codes_of(nn.Linear(4, 4).half()) == ""


EIGHT = ("int8", "q8_0")


@pytest.mark.parametrize(
    "codes", ["nf4", "fp4", "int8", "int4", "fp8", "fp8-rows", "q8_0", "q5_0", "q5_1", "q4_0", "q4_k"]
)
def test_rounding_to_codes_is_near_and_done_once(codes: str) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).double()
    once = rounded_to(codes, weight)
    assert 0 < norm(once - weight) < (0.02 if codes in EIGHT else 0.2) * norm(weight)
    assert torch.allclose(rounded_to(codes, once), once)
    assert torch.equal(rounded_to(codes, torch.zeros(3, 5).double()), torch.zeros(3, 5).double())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rounding_is_that_of_ggufs_own_code(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    stored = gguf.GGMLQuantizationType[kind]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), stored), stored)).double()
    assert norm(rounded_to(kind.lower(), weight.double()) - theirs) < 2**-10 * norm(theirs)  # their scales are halves


def update_of(rows: int, columns: int, rank: int, seed: int) -> tuple[torch.Tensor, Update]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator).double()
    a = torch.randn(rank, columns, generator=generator) / columns**0.5
    b = torch.randn(rows, rank, generator=generator) * (0.7 * columns**0.5 / rank**0.5)
    return base, Update({"A": a, "B": b, "magnitude": 0.5 + torch.rand(rows, 1, generator=generator)}, low_rank(a, b))


def fitted(variant: str, codes: str, base: torch.Tensor, after: torch.Tensor, update: Update) -> Fit:
    layer = Layer("linear", *base.shape, codes=codes)
    whole = (slice(0, len(base)),)
    (found,) = get_variant(variant).fits(base, after, update, whole, expected=0.5, dtype="float32", layer=layer)
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("times", "right"), [(1.0, True), (1.05, False), (2.0, False), (0.5, False)])
@pytest.mark.parametrize("codes", ["nf4", "fp4", "int8", "fp8", "q8_0", "q4_0", "q5_1"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_merge_into_codes_is_right_and_a_wrong_scale_still_shows(
    variant: str, codes: str, times: float, right: bool, seed: int
) -> None:
    base, update = update_of(64, 64, 4, seed)
    base = rounded_to(codes, base)
    merged = get_variant(variant).exact(base, update, 0.5 * times)
    for after in (rounded_to(codes, merged), merged):
        seen = fitted(variant, codes, base, after, update)
        assert seen.direction_right
        assert seen.scale_right is right


def test_what_is_added_beside_codes_is_held_to_one_in_a_hundred() -> None:
    base, update = update_of(64, 64, 4, 1)
    seen = fitted(
        "lora", "int8", rounded_to("int8", base), rounded_to("int8", base) + 0.505 * update.direction.product, update
    )
    assert seen.direction_right
    assert not seen.scale_right


def test_the_scale_of_an_update_far_below_the_steps_says_nothing() -> None:
    base, update = update_of(32, 32, 4, 2)
    small = Update(update.parts, replace(update.direction, product=update.direction.product / 200))
    base = rounded_to("nf4", base)
    assert fitted("lora", "nf4", base, base, small).faint


@pytest.mark.parametrize("codes", ["nf4", "q4_0"])
def test_a_magnitude_left_out_shows_through_codes(codes: str) -> None:
    """What is missing is larger than what is there, and the steps are larger still."""
    base, update = update_of(64, 64, 4, 1)
    small = Update({**update.parts, "magnitude": update.parts["magnitude"] * 16}, update.direction)
    base = rounded_to(codes, base)
    seen = fitted("dora", codes, base, rounded_to(codes, base + 0.5 * update.direction.product), small)
    assert seen.change < seen.tolerance.noise
    assert not seen.unchanged
    assert not seen.direction_right


@pytest.mark.parametrize("codes", ["nf4", "q4_0", "int8", "fp8"])
def test_a_known_mistake_is_named_through_codes(codes: str) -> None:
    base, update = update_of(64, 64, 4, 1)
    base, layer = rounded_to(codes, base), Layer("linear", 64, 64, codes=codes)
    dora = get_variant("dora")
    for what, weight in dora.mistakes(base, update, expected=0.5, strength=0.5):
        seen = dora.mistake(base, rounded_to(codes, weight), update, expected=0.5, strength=0.5, layer=layer)
        assert seen is not None
        if what in ("the magnitude is left out", "nothing is divided by the norm"):
            assert seen == what
    right = rounded_to(codes, dora.exact(base, update, 0.25))
    assert dora.mistake(base, right, update, expected=0.5, strength=0.5, layer=layer) is None


def test_what_comes_to_the_same_as_what_is_right_is_no_mistake() -> None:
    base, update = update_of(64, 64, 4, 1)
    dora = get_variant("dora")
    noise = 1e-4 * torch.randn(64, 64).double()
    seen = partial(dora.mistake, base, dora.exact(base, update, 0.5) + noise, update, expected=0.5)
    assert seen(strength=1.0, residual=2 * norm(noise)) is None


def test_a_layer_left_out_of_codes_is_seen() -> None:
    base, update = update_of(32, 48, 2, 3)
    base = rounded_to("int8", base)
    seen = fitted("lora", "int8", base, base, update)
    assert seen.unchanged
    assert not seen.scale_right


def test_a_layer_says_what_it_is() -> None:
    assert layer_of(nn.Conv1d(3, 5, 3)) == Layer("conv", 5, 9, True, (3,), (1,), (0,), (1,))
