"""What a loader is judged by is the closed form: the direction of each variant is its product, written out."""

from __future__ import annotations

import pytest
import torch

from harness.benches import Layer
from harness.variants import VARIANTS
from tests import closed_form as closed

LINEAR, CONV, TABLE = Layer("linear", 12, 20), Layer("conv", 12, 5 * 9, kernel=(3, 3)), Layer("embedding", 12, 20)
HADA = ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")
PRODUCTS = {
    "lora": (LINEAR, lambda p: closed.product(p["A"], p["B"])),
    "dora": (LINEAR, lambda p: closed.product(p["A"], p["B"])),
    "conv": (CONV, lambda p: closed.conv_product(p["A"], p["B"])),
    "tucker": (CONV, lambda p: closed.tucker_product(p["A"], p["B"], p["mid"])),
    "embedding": (TABLE, lambda p: closed.embedding_product(p["embedding_A"], p["embedding_B"]).T),
    "loha": (LINEAR, lambda p: closed.loha_product(*([p[role] for role in half] for half in HADA))),
    "lokr": (LINEAR, lambda p: closed.lokr_product([p["lokr_w1"]], [p["lokr_w2_a"], p["lokr_w2_b"]])),
    "lokr-full": (LINEAR, lambda p: closed.lokr_product([p["lokr_w1"]], [p["lokr_w2"]])),
    "full": (CONV, lambda p: closed.full_weight(torch.zeros(12, 5, 3, 3), p["diff"])),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_direction_is_the_product_written_out(name: str) -> None:
    layer, product = PRODUCTS[name]
    parts = VARIANTS[name].draw(layer, 3, torch.Generator().manual_seed(5))
    found, exact = VARIANTS[name].direction(parts, layer).product, product(parts).reshape(layer.shape)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)
