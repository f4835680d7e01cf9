"""Patterns rewritten in another style mean the same, however many modules they name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from harness.checks.patterns import rewrite_patterns
from harness.example import Patterns
from harness.files import read_lora, write_lora
from harness.files.adapter import LoraWeights


@pytest.mark.parametrize("style", get_args(Patterns))
@pytest.mark.parametrize("number", [3, 160])
def test_another_style_means_the_same(style: Patterns, number: int, tmp_path: Path) -> None:
    modules = {}
    for n in range(number):
        rank = 1 + n % 4
        a, b = torch.ones(rank, 6), torch.ones(5, rank)
        modules[f"down_blocks.{n}.attentions.{n % 7}.to_{'qkv'[n % 3]}"] = LoraWeights(a, b, 1.0 + n % 5)
    path = write_lora(tmp_path / "adapter", "peft", modules)
    rewrite_patterns(path, style)
    read = read_lora(path)
    assert not read.problems
    found = {name: (module.rank, module.alpha) for name, module in read.modules.items()}
    assert found == {name: (weights.rank, weights.alpha) for name, weights in modules.items()}
