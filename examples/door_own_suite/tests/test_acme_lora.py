"""The package's own tests of its loader: each check of the harness is one of them."""

from __future__ import annotations

import acme_lora
import pytest

from harness import measure_law, parametrize_with_checks


@parametrize_with_checks([acme_lora.load], benches=["qwen-image-fused"], max_examples=50)
def test_loader(check):
    check()


@pytest.mark.parametrize("bench", ["qwen-image", "qwen-image-fused"])
def test_the_loader_scales_as_training_did(bench):
    assert measure_law(acme_lora.load, format="kohya", bench=bench).formula == "strength * alpha / rank"
