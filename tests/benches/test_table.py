"""The table of benches: every row builds at once, runs where it says how, and is what its library calls it."""

from __future__ import annotations

import pytest
import torch

from harness.benches import bench_names, get_bench, more_benches
from harness.benches.layer import parameter_of
from harness.benches.table import row_of, rows
from harness.checks.cell import cells_beside, cells_of
from harness.errors import UserError
from harness.loaders.live.diffusers import MORE
from harness.loaders.registry import resolve


@pytest.mark.filterwarnings(
    "ignore:In CPU autocast", "ignore:Mismatch dtype between input", "ignore:flex_attention called"
)
@pytest.mark.parametrize("name", more_benches())
def test_a_row_builds_and_twice_the_same(name: str) -> None:
    bench = get_bench(name)
    layers, model = bench.layers, bench.build()
    assert layers
    assert set(bench.lora_layers) <= set(layers)
    weights, again = ({n: parameter_of(m, n, layers[n]) for n in bench.lora_layers} for m in (model, bench.build()))
    assert all(bool(weight.any()) for weight in weights.values())
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    for dtype in bench.dtypes:
        assert bool(bench.forward(bench.build(getattr(torch, dtype))).isfinite().all())


def test_seventy_architectures_are_there_and_few_are_checked_unasked() -> None:
    assert len(more_benches()) + len(bench_names()) >= 70
    assert sum(row.library == "diffusers" and row.mixin is not None for row in rows().values()) >= 48
    assert sum(row.library == "transformers" for row in rows().values()) >= 23
    assert not set(bench_names()) & set(more_benches())
    assert set(resolve("peft").benches) <= set(bench_names())


def test_a_model_is_known_by_its_class_and_its_configuration() -> None:
    for name in ("sdxl-unet", "anima", "cosmos", "wan21-t2v", "chroma"):
        row = row_of(get_bench(name).base())
        assert row is not None
        assert (row.mixin, row.component) == (rows()[name].mixin, rows()[name].component)
    unet = row_of(get_bench("sd-unet").base())
    assert unet is not None
    assert unet.mixin == "StableDiffusionLoraLoaderMixin"
    assert row_of(torch.nn.Linear(2, 2)) is None


def test_the_authors_own_names_stack_what_is_apart_in_diffusers() -> None:
    view = get_bench("hunyuan-video").merged_view
    assert view is not None
    stacked = view.made_of["double_blocks.0.img_attn_qkv"]
    assert [part.rpartition(".")[2] for part, _ in stacked] == ["to_q", "to_k", "to_v"]


def test_the_rest_of_the_table_is_a_cell_each_when_it_is_asked_for() -> None:
    beside = cells_beside(resolve("diffusers"))
    assert {cell.bench_name for cell in beside} == set(MORE)
    assert {cell.format for cell in beside} == {"diffusers"}
    (cell,) = cells_of(resolve("diffusers"), ["diffusers"], ["sana"], ["lora"])[0]
    assert cell.bench_name == "sana"


def test_a_name_that_is_nearly_one_is_guessed() -> None:
    with pytest.raises(UserError, match=r"bench='wan21': no such bench; did you mean wan21-\w+ or "):
        get_bench("wan21")
