"""Benches described to another interpreter: plain layers, or the class of another release, with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch

from harness.benches import get_bench, given, registry
from harness.benches.given import describe_benches, take_benches
from harness.errors import UserError
from harness.measure.effective import effective_weights


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Leave no bench behind that was given."""
    monkeypatch.setattr(registry, "_GIVEN", {})
    monkeypatch.setattr(given, "_running", {})
    yield
    registry._given.cache_clear()


@pytest.mark.parametrize("name", ["qwen-image", "sd-unet", "gpt2", "clip-text"])
@pytest.mark.parametrize("plain", [True, False])
def test_the_given_bench_has_the_layers_and_weights_of_the_one_described(name, plain, tmp_path):
    own = get_bench(name)
    take_benches(describe_benches([name, name], tmp_path, plain=plain))
    found = get_bench(name)
    assert found is not own
    assert found.layers == own.layers
    before, after = (effective_weights(each.base(), own.layers) for each in (own, found))
    assert all(torch.equal(before[layer], after[layer]) for layer in own.layers)
    assert torch.equal(found.forward(found.build()), found.forward(found.base()))
    assert plain != torch.equal(found.forward(found.base()), own.forward(own.base()))


def test_a_change_of_any_layer_shows_in_the_forward_of_plain_layers(tmp_path):
    take_benches(describe_benches(["clip-text"], tmp_path, plain=True))
    found = get_bench("clip-text")
    before = found.forward(found.base())
    for name in found.layers:
        model = found.build()
        model.get_submodule(name).weight.data[0] += 1.0
        assert not torch.equal(found.forward(model), before), name


def test_a_layer_is_told_from_one_whose_path_ends_in_the_same_words(tmp_path):
    """FLUX has `proj_out` and, earlier, `single_transformer_blocks.0.proj_out`, of another width."""
    take_benches(describe_benches(["flux"], tmp_path, plain=True))
    found = get_bench("flux")
    assert found.forward(found.base()).numel()
    wrapped = torch.nn.ModuleDict({"model": found.build()})
    assert torch.equal(found.forward(wrapped), found.forward(found.base()))


def test_a_model_that_the_release_does_not_have_is_named(tmp_path, monkeypatch):
    told = describe_benches(["flux"], tmp_path, plain=False)
    take_benches(told)  # asks for nothing yet: other benches may be there

    def absent(name):
        raise ModuleNotFoundError("No module named 'diffusers.flux'")

    monkeypatch.setattr(given, "built_bench", absent)
    with pytest.raises(UserError, match="bench flux is no model of this release"):
        get_bench("flux")


def test_another_class_of_that_name_is_not_measured_for_it(tmp_path, monkeypatch):
    told = describe_benches(["clip-text"], tmp_path, plain=False)
    monkeypatch.setattr(
        given,
        "built_bench",
        lambda name: replace(get_bench("qwen-image"), name=name, make=lambda: torch.nn.Linear(2, 2)),
    )
    take_benches(told)
    with pytest.raises(UserError, match="its class is another one in this release"):
        get_bench("clip-text").base()


def test_a_model_that_is_called_otherwise_there_is_asked_layer_by_layer(tmp_path, monkeypatch):
    own = get_bench("clip-text")

    def other(model, noise):
        raise TypeError("forward() got an unexpected keyword argument")

    told = describe_benches(["clip-text"], tmp_path, plain=False)
    monkeypatch.setattr(given, "built_bench", lambda name: replace(own, run=other))
    take_benches(told)
    found = get_bench("clip-text")
    assert torch.isfinite(found.forward(found.build())).all()
