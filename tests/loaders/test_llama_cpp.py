"""llama.cpp's own code, through its Python packages: what it makes of alpha and of its scale."""

from __future__ import annotations

import pytest
import torch

from harness.checks.cell import Cell
from harness.checks.outputs import judge_outputs, observe_outputs
from harness.example import Example, Target
from harness.files import LoraWeights, write_lora
from harness.loaders.as_gguf import adapter_file
from harness.loaders.live import live_loaders
from harness.loaders.registry import resolve

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(params=["llama-cpp", "xllamacpp"])
def engine(request):
    if (reason := live_loaders()[request.param].reason()) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return resolve(request.param)


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 0.75), (0.0, 0.5)])
def test_it_multiplies_by_its_scale_and_alpha_over_rank_and_takes_alpha_0_for_none(engine, form, alpha, scale):
    cell = Cell(engine, form, "tiny-llama")
    seen = observe_outputs(cell, Example((Target(LAYER, 4, alpha),), 0.5))
    (fit,) = seen.fits[LAYER]
    assert fit.scale == pytest.approx(scale, rel=1e-4)
    assert fit.relative_residual < 1e-4
    assert judge_outputs(seen) == []
    assert seen.zero_alpha == ({"as the rank"} if alpha == 0 else set())


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("alpha", [6.0, 0.0])
def test_llama_cpp_gets_its_own_names_and_all_that_the_file_says(form, alpha, tmp_path):
    a, b = torch.randn(4, 16), torch.randn(8, 4)
    lora = write_lora(tmp_path / ("adapter" if form == "peft" else "lora"), form, {LAYER: LoraWeights(a, b, alpha)})
    (tmp_path / "out").mkdir()
    file = gguf.GGUFReader(adapter_file(lora, tmp_path / "out"))
    said = file.get_field("adapter.lora.alpha")
    assert float(said.parts[said.data[0]][0]) == alpha
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    assert tensors.keys() == {f"blk.1.ffn_down.weight.lora_{part}" for part in "ab"}
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], a)
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], b)
