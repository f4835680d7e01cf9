"""The benches are diffusers' own model, and merging q, k and v leaves its forward as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.benches import bench_names, get_bench
from harness.errors import UserError

FOUNDING_TARGETS = {
    "to_qkv", "add_qkv_proj", "to_out.0", "to_add_out", "img_mlp.net.0.proj",
    "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1",
}  # fmt: skip


def test_the_merged_form_computes_what_the_split_form_does() -> None:
    split, merged = get_bench("qwen-image"), get_bench("qwen-image-fused")
    assert torch.equal(split.forward(split.build()), merged.forward(merged.build()))


def test_the_merged_layers_carry_the_forward() -> None:
    bench = get_bench("qwen-image-fused")
    model = bench.build()
    model.get_submodule("transformer_blocks.0.attn.to_qkv").weight.zero_()
    assert not torch.equal(bench.forward(model), bench.forward(bench.build()))


def test_the_merged_form_has_the_ten_founding_targets() -> None:
    bench = get_bench("qwen-image-fused")
    assert set(bench.targets) == FOUNDING_TARGETS
    assert len(bench.lora_layers) == 20


@pytest.mark.parametrize("name", bench_names())
def test_every_build_has_equal_weights_and_is_a_copy(name: str) -> None:
    bench = get_bench(name)
    one, two = bench.build(torch.bfloat16), bench.build(torch.bfloat16)
    first = bench.lora_layers[0]
    assert torch.equal(one.get_submodule(first).weight, two.get_submodule(first).weight)
    one.get_submodule(first).weight.zero_()
    assert two.get_submodule(first).weight.abs().sum() > 0


@pytest.mark.parametrize("name", bench_names())
def test_targets_have_square_and_rectangular_layers(name: str) -> None:
    bench = get_bench(name)
    shapes = [bench.layers[layer].shape for layer in bench.lora_layers]
    assert any(rows == columns for rows, columns in shapes)
    assert any(rows > columns for rows, columns in shapes)
    assert any(rows < columns for rows, columns in shapes)


def test_an_unknown_bench_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="qwen-image"):
        get_bench("nope")


def test_packages_that_do_not_fit_together_are_one_sentence() -> None:
    def make() -> torch.nn.Module:
        raise RuntimeError("Failed to import the model because of:\ncannot import name 'HybridCache'")

    bench = replace(get_bench("qwen-image"), make=make)
    with pytest.raises(UserError, match=r"bench qwen-image cannot be built .*: cannot import name 'HybridCache'$"):
        _ = bench.view
