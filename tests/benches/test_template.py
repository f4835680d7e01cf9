"""A template builds what `copy.deepcopy` would."""

from __future__ import annotations

import pytest
import torch

from harness.benches import bench_names, get_bench


@pytest.mark.parametrize("name", bench_names())
def test_a_built_model_has_tensors_of_its_own_and_computes_the_same(name: str) -> None:
    bench = get_bench(name)
    first, second = bench.build(), bench.build()
    own = {tensor.data_ptr() for model in (first, second, bench.base()) for tensor in model.state_dict().values()}
    distinct = {tensor.data_ptr() for tensor in bench.base().state_dict().values()}
    assert len(own) == 3 * len(distinct)
    assert torch.equal(bench.forward(first), bench.forward(bench.base()))
    assert not any(module.training for module in first.modules())


def test_tied_weights_stay_tied() -> None:
    model = get_bench("gpt2").build()
    assert model.get_submodule("lm_head").weight is model.get_submodule("transformer.wte").weight


def test_a_changed_copy_changes_no_other() -> None:
    bench = get_bench("qwen-image")
    before = bench.forward(bench.base())
    model = bench.build()
    for weight in model.parameters():
        weight.data.zero_()
    model.register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(bench.forward(bench.build()), before)
    assert not bench.build()._forward_pre_hooks
