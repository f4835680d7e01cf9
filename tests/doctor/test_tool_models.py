"""A tool that takes the authors' names is not said to take diffusers' under the same prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor.answers import answer
from harness.doctor.traits import Traits
from harness.files import read_lora
from harness.law.known import tools

DIFFUSERS = ["transformer_blocks.{}.attn.to_q", "single_transformer_blocks.{}.proj_mlp"]
AUTHORS = ["double_blocks.{}.img_attn.proj", "single_blocks.{}.linear2"]
SHAPES = {
    "loha": {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 64)},
    "lokr": {"lokr_w1": (8, 8), "lokr_w2": (8, 8)},
}


def file_of(folder: Path, names: list[str], kind: str) -> Traits:
    layers = [f"diffusion_model.{name.format(block)}" for name in names for block in range(2)]
    tensors = {f"{layer}.{key}": torch.randn(*shape) for layer in layers for key, shape in SHAPES[kind].items()}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(2.0) for layer in layers}, folder / f"{kind}.safetensors")
    return Traits(read_lora(folder / f"{kind}.safetensors"))


@pytest.mark.parametrize("kind", SHAPES)
def test_names_that_the_model_of_a_tool_may_not_have_get_no_number(tmp_path: Path, kind: str) -> None:
    traits = file_of(tmp_path, DIFFUSERS, kind)
    assert ("flux", "own") in traits.groups[0].places
    assert answer(tools()["comfyui"], traits).strength is None


@pytest.mark.parametrize("kind", SHAPES)
def test_names_of_the_authors_do(tmp_path: Path, kind: str) -> None:
    assert answer(tools()["comfyui"], file_of(tmp_path, AUTHORS, kind)).strength is not None
