"""llama.cpp's own code, through its Python package: what it makes of alpha and of its scale."""

from __future__ import annotations

import pytest

from harness.checks.cell import Cell
from harness.checks.outputs import judge_outputs, observe_outputs
from harness.example import Example, Target
from harness.loaders.registry import resolve

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 0.75), (0.0, 0.5)])
def test_it_multiplies_by_its_scale_and_alpha_over_rank_and_takes_alpha_0_for_none(form, alpha, scale):
    cell = Cell(resolve("llama-cpp"), form, "tiny-llama")
    seen = observe_outputs(cell, Example((Target(LAYER, 4, alpha),), 0.5))
    (fit,) = seen.fits[LAYER]
    assert fit.scale == pytest.approx(scale, rel=1e-4)
    assert fit.relative_residual < 1e-4
    assert judge_outputs(seen) == []
    assert seen.zero_alpha == ({"as the rank"} if alpha == 0 else set())
