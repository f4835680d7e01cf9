"""Which architectures a file can be for, when layers of several are called alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from harness.law.reads import Place, layers_of
from harness.law.sizes import families, fitting, like

QWEN, FLUX, SD3, SD, SDXL = ((family, "own") for family in ("qwen-image", "flux", "sd3", "sd-unet", "sdxl-unet"))
UNKNOWN = ("nobody", "own")


@dataclass(frozen=True)
class Layer:
    """A layer of a file."""

    name: str
    in_features: int
    out_features: int


def blocks(stack: str, numbers: Sequence[int], width: int, layer: str = "attn.to_q") -> Iterator[Layer]:
    return (Layer(f"{stack}.{number}.{layer}", width, width) for number in numbers)


def families_of(places: Sequence[Place], *layers: Iterator[Layer]) -> list[str]:
    return [family for family, _ in fitting(places, [layer for some in layers for layer in some])]


@pytest.mark.parametrize(
    ("width", "left"),
    [(3072, ["qwen-image", "flux", "nobody"]), (1536, ["sd3", "nobody"]), (2048, ["nobody"])],
)
def test_another_width_is_another_model(width: int, left: list[str]) -> None:
    assert families_of([QWEN, FLUX, SD3, UNKNOWN], blocks("transformer_blocks", [0, 1], width)) == left


def test_a_bench_has_the_names_alone() -> None:
    assert families_of([QWEN, SD3], blocks("transformer_blocks", [0, 1], 64)) == ["qwen-image", "sd3"]


def test_a_block_behind_the_last_is_another_model() -> None:
    assert families_of([QWEN, FLUX], blocks("transformer_blocks", [0, 20], 3072)) == ["qwen-image"]
    assert families_of([FLUX], blocks("transformer_blocks", [0, 18], 3072)) == ["flux"]


def test_all_blocks_of_one_model_are_that_model() -> None:
    every = blocks("transformer_blocks", range(19), 3072)
    assert families_of([QWEN, FLUX], every) == ["flux"]


def test_all_blocks_of_none_are_no_model_that_is_known() -> None:
    assert families_of([QWEN, FLUX, UNKNOWN], blocks("transformer_blocks", range(40), 3072)) == ["nobody"]
    some = blocks("transformer_blocks", range(10), 3072), blocks("single_transformer_blocks", range(38), 3072)
    assert families_of([FLUX], *some) == ["flux"]


def test_what_attention_listens_to_tells_unets_apart() -> None:
    names = ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
    for inputs, left in ((2048, ["sdxl-unet"]), (768, ["sd-unet"]), (1024, ["sd-unet"]), (4096, [])):
        assert [family for family, _ in fitting([SD, SDXL], [Layer(names[0], inputs, 640)])] == left


def test_stacks_inside_stacks_have_a_depth_too() -> None:
    deep = Layer("down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_q", 1280, 1280)
    assert [family for family, _ in fitting([SD, SDXL], [deep])] == ["sdxl-unet"]


def test_every_row_is_an_architecture_of_the_table() -> None:
    assert [family for family in families() if not layers_of((family, "own"))] == []
    assert like(SDXL) == SD
    assert like(QWEN) is None


@pytest.mark.parametrize(
    ("layer", "model"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "sd-unet"),
        ("up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q", "sd-unet"),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "sd-unet"),
        ("output_blocks.10.1.proj_in", "sd-unet"),
        ("up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "sdxl-unet"),
        ("output_blocks.1.1.transformer_blocks.0.attn1.to_q", "sdxl-unet"),
    ],
)
def test_unets_are_told_by_the_blocks_that_have_attention(layer: str, model: str) -> None:
    places = [(family, "own") for family in ("sd-unet", "sdxl-unet")]
    assert fitting(places, [Layer(layer, 640, 640)]) == [(model, "own")]
