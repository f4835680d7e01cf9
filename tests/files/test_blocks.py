"""Layers stacked into a merged one are recognised exactly and taken apart again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.files.stacked import fused_heights, split_blocks, stack_blocks


def parts(heights: list[int], ranks: list[int], inputs: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(r, inputs), torch.randn(h, r)) for h, r in zip(heights, ranks, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(1, 5))
def test_what_was_stacked_is_split_into_the_same_parts(heights: list[int], rank: int) -> None:
    made = parts(heights, [rank] * len(heights))
    found = split_blocks(*stack_blocks(made), heights)
    assert found is not None
    assert all(
        torch.equal(x, y) for left, right in zip(found, made, strict=True) for x, y in zip(left, right, strict=True)
    )


def test_the_merged_product_is_the_parts_one_below_the_other() -> None:
    made = parts([2, 3, 4], [1, 2, 3])
    a, b = stack_blocks(made)
    assert torch.allclose(b @ a, torch.cat([up @ down for down, up in made]), atol=1e-6)


def test_a_dense_pair_and_one_stray_number_are_no_blocks() -> None:
    a, b = stack_blocks(parts([2, 2, 2], [2, 2, 2]))
    assert split_blocks(torch.randn(6, 5), torch.randn(6, 6), [2, 2, 2]) is None
    b[0, 5] = 1e-30
    assert split_blocks(a, b, [2, 2, 2]) is None


def test_heights_and_ranks_that_do_not_fit_are_no_blocks() -> None:
    a, b = stack_blocks(parts([2, 2, 2], [2, 2, 2]))
    assert split_blocks(a, b, [2, 2, 3]) is None
    assert split_blocks(a[:5], b[:, :5], [2, 2, 2]) is None
    assert split_blocks(a, torch.zeros_like(b), [2, 2, 2]) is None


@pytest.mark.parametrize(
    ("name", "rows", "heights"),
    [
        ("double_blocks.0.img_attn.qkv", 12, (4, 4, 4)),
        ("double_blocks_0_txt_attn_qkv", 9216, (3072, 3072, 3072)),
        ("single_blocks.3.linear1", 21504, (3072, 3072, 3072, 12288)),
        ("single_blocks_3_linear1", 14, (2, 2, 2, 8)),
        ("single_blocks.3.linear1", 9216, None),
        ("double_blocks.0.img_attn.proj", 12, None),
        ("blocks.0.notqkv", 12, None),
        ("blocks.0.qkv", 2, None),
    ],
)
def test_the_rows_of_merged_layers_are_known_by_name(name: str, rows: int, heights: tuple[int, ...] | None) -> None:
    assert fused_heights(name, rows) == heights
