from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from harness.images.sampling import PerSample, per_sample, runtime_scaling, same_branches


def adapted(alpha: float = 8.0, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))
    return inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights=False), model
    )


def test_every_sample_gets_its_own_scale_and_the_numbers_come_back():
    model, x = adapted(), torch.randn(3, 5, 6)
    plain = runtime_scaling(model)
    assert plain == {"0": {"default": 2.0}, "2": {"default": 2.0}}
    scalings = [{name: {"default": 2.0 * s} for name in plain} for s in (0.0, 1.0, 4.0)]
    with per_sample(model, scalings):
        together = model(x)
    for row, (strength, sample) in enumerate(zip((0.0, 1.0, 4.0), x, strict=True)):
        for layer in (model[0], model[2]):
            layer.set_scale("default", strength)
        torch.testing.assert_close(together[row], model(sample[None])[0])
        for layer in (model[0], model[2]):
            layer.set_scale("default", 1.0)
    assert runtime_scaling(model) == plain


def test_scales_come_back_after_an_error():
    model = adapted()
    with pytest.raises(RuntimeError), per_sample(model, [runtime_scaling(model)]):
        raise RuntimeError
    assert runtime_scaling(model) == {"0": {"default": 2.0}, "2": {"default": 2.0}}


def test_guidance_doubles_the_batch_and_repeats_the_scales():
    assert (torch.ones(4, 2) * PerSample([1.0, 3.0]))[:, 0].tolist() == [1.0, 3.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="batch of 3"):
        torch.ones(3, 2) * PerSample([1.0, 3.0])


def test_merged_disabled_and_plain_models_have_no_runtime_scaling():
    model = adapted()
    model[0].merge()
    assert runtime_scaling(model) is None
    assert runtime_scaling(torch.nn.Linear(2, 2)) is None


def test_models_that_differ_in_more_than_the_scale_are_not_the_same():
    assert same_branches(adapted(8.0), adapted(4.0))
    assert not same_branches(adapted(seed=0), adapted(seed=1))
