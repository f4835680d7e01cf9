"""Blocks and the places of modules in them, from names alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.doctor import inspect_file
from harness.files import LoraWeights, write_lora
from harness.verdict.blocks import OUTSIDE, block_of, by_block, group_of, place_of


def pair(size: float) -> LoraWeights:
    return LoraWeights(torch.randn(4, 16) / 4, size * torch.randn(24, 4) / 2, 8.0)


def test_blocks_sum_their_modules_as_one_matrix_would(tmp_path: Path) -> None:
    modules = {f"to_blocks.{i}.{kind}": pair(1.0) for i in (10, 9) for kind in ("q", "k")} | {"proj_out": pair(1.0)}
    record = inspect_file(write_lora(tmp_path / "x", "diffsynth", modules), energy=True)
    assert record.energies is not None
    blocks = by_block(record.energies)
    assert [block.name for block in blocks] == ["to_blocks.9", "to_blocks.10", OUTSIDE]
    dense = torch.stack([2.0 * modules[f"to_blocks.9.{kind}"].b @ modules[f"to_blocks.9.{kind}"].a for kind in "qk"])
    assert blocks[0].norm == pytest.approx(float(dense.norm()), rel=1e-5)
    assert blocks[0].spectral == pytest.approx(float(torch.linalg.svdvals(dense).max()), rel=1e-5)
    assert sum(block.norm**2 for block in blocks) == pytest.approx(sum(e.norm**2 for e in record.energies.values()))


@pytest.mark.parametrize(
    ("block", "inner", "kind"),
    [
        ("transformer_blocks.7", "", "attn.to_out.0"),
        ("down_blocks_1", "_attentions_0_transformer_blocks_3", "ff_net_0_proj"),
        ("input_blocks.4", ".1.transformer_blocks.0", "attn1.to_q"),
        ("te1:text_model_encoder_layers_3", "", "mlp_fc1"),
        ("h.3", "", "attn.c_attn"),
    ],
)
def test_a_module_has_a_block_and_a_place_in_it(block: str, inner: str, kind: str) -> None:
    name = f"{block}{inner}{'_' if '_' in kind else '.'}{kind}"
    assert block_of(name) == block
    assert place_of(name) == (block + inner, kind)
    assert (block_of("proj_out"), place_of("proj_out")) == (OUTSIDE, (OUTSIDE, "proj_out"))


@pytest.mark.parametrize(
    ("block", "group", "rest"),
    [
        ("transformer_blocks.7", "transformer_blocks", "7"),
        ("down_blocks.1.attentions.0", "down_blocks.1", "attentions.0"),
        ("lora_te_text_model_encoder_layers_3", "lora_te_text_model_encoder_layers", "3"),
        (OUTSIDE, OUTSIDE, ""),
    ],
)
def test_a_block_has_a_group_and_what_tells_it_apart_in_it(block: str, group: str, rest: str) -> None:
    assert group_of(block) == (group, rest)
