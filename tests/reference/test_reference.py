"""PEFT's merge and the float64 closed form agree for arbitrary rank, alpha and strength."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.strategies import alphas, ranks, strengths
from tests.closed_form import delta, merged_weight
from tests.peft_factors import peft_merged_weights


@st.composite
def factors(draw):
    shapes = {"a.to_q": (6, 4), "a.to_out.0": (5, 7), "b.to_q": (3, 3)}
    chosen = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    found = {}
    for name in chosen:
        rank = draw(ranks())
        rows, columns = shapes[name]
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        found[name] = (a, b, draw(alphas(rank)))
    return found


def model() -> nn.Module:
    torch.manual_seed(1)
    block = nn.ModuleDict({"to_q": nn.Linear(4, 6), "to_out": nn.ModuleList([nn.Linear(7, 5)])})
    return nn.ModuleDict({"a": block, "b": nn.ModuleDict({"to_q": nn.Linear(3, 3)})})


@given(factors(), strengths())
@settings(max_examples=150, deadline=None)
def test_peft_and_the_closed_form_agree(parts, strength: float) -> None:
    base = model()
    merged = peft_merged_weights(model(), parts, strength=strength)
    for name, (a, b, alpha) in parts.items():
        exact = merged_weight(base.get_submodule(name).weight, a, b, alpha, strength=strength)
        size = exact.abs().max() + (b.abs() @ a.abs()).max() * abs(strength * alpha / a.shape[0])
        assert torch.all((merged[name].double() - exact).abs() <= 64 * 2.0**-24 * size)


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_stabilised_scaling_divides_by_the_root(rslora: bool) -> None:
    a, b = torch.randn(16, 4), torch.randn(6, 16)
    merged = peft_merged_weights(model(), {"a.to_q": (a, b, 4.0)}, rslora=rslora)["a.to_q"]
    exact = model().get_submodule("a.to_q").weight.double() + delta(a, b, 4.0, rslora=rslora)
    assert torch.allclose(merged.double(), exact, atol=1e-5)
