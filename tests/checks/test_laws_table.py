"""The committed table of laws behind the prescriptions is what the harness measures today."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.checks.cell import Cell
from harness.checks.law import measure_law
from harness.checks.strength_table import strength_table
from harness.files import LoraWeights, write_lora
from harness.law.known import known_laws
from harness.loaders.registry import installed, resolve

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "raw_alpha.py") + ":load"
SPECS = {"raw alpha": EXAMPLE}
AVAILABLE = {each.name for each in installed() if each.available}


@pytest.mark.parametrize("name", known_laws())
def test_the_table_has_the_law_that_is_measured(name: str) -> None:
    if name not in AVAILABLE | set(SPECS):
        pytest.skip(f"{name} is not installed here")
    row, law = known_laws()[name], measure_law(SPECS.get(name, name)).diagnosis.law
    assert law is not None
    assert law.exponents == row.law.exponents
    assert law.constant == row.law.constant
    assert not law.ambiguous


def test_transformers_applies_an_adapter_at_alpha_over_rank(tmp_path: Path) -> None:
    """The row of `transformers`, which is no live loader: `model.load_adapter(folder)`."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    names = [f"model.layers.0.self_attn.{each}_proj" for each in "qo"]
    weights = [LoraWeights(torch.randn(r, 24), torch.randn(24, r), alpha) for r, alpha in ((4, 2.0), (8, 12.0))]
    model.load_adapter(str(write_lora(tmp_path / "peft", "peft", dict(zip(names, weights, strict=True)))))
    for name, each in zip(names, weights, strict=True):
        assert each.alpha is not None
        delta = model.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(delta, each.alpha / each.rank * (each.b @ each.a), atol=1e-5)
    row = known_laws()["transformers"]
    assert row.law.is_trained


def founding(rank: int, alpha: float, *strengths: float) -> list[tuple[float, str]]:
    cell = Cell(resolve("diffsynth-2.0.4"), "diffsynth", "qwen-image-fused")
    return [
        (round(row.factor, 4), row.word) for row in strength_table(cell, rank=rank, alpha=alpha, strengths=strengths)
    ]


@pytest.mark.skipif("diffsynth-2.0.4" not in AVAILABLE, reason="diffsynth-2.0.4 is not installed here")
def test_the_founding_table_with_the_real_old_loader() -> None:
    too_strong = "too strong: artifacts expected"
    assert founding(32, 32.0, 1, 4, 32) == [(1, "as trained"), (4, too_strong), (32, "noise expected")]
    assert founding(32, 16.0, 0.5, 1.0) == [(1, "as trained"), (2, too_strong)]
