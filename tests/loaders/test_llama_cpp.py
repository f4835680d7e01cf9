"""llama.cpp's own code, through its Python packages: what it makes of alpha and of its scale."""

from __future__ import annotations

import json

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
LAYERS = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
LAYER = LAYERS[0]


@pytest.fixture(params=["llama-cpp", "xllamacpp"])
def engine(request):
    if (reason := live_loaders()[request.param].reason()) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return resolve(request.param)


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 0.75), (0.0, 0.5)])
def test_it_multiplies_by_its_scale_and_alpha_over_rank_and_takes_alpha_0_for_none(engine, form, layer, alpha, scale):
    cell = Cell(engine, form, "tiny-llama")
    seen = observe_outputs(cell, Example((Target(layer, 4, alpha),), 0.5))
    (fit,) = seen.fits[layer]
    assert fit.scale == pytest.approx(scale, rel=1e-4)
    assert fit.relative_residual < 1e-4
    assert judge_outputs(seen) == []
    assert seen.zero_alpha == ({"as the rank"} if alpha == 0 else set())


def written(lora, folder):
    """Return the alpha and the tensors of the file that llama.cpp gets for a model of two heads, one for k and v."""
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "num_key_value_heads": 1}))
    (folder / "out").mkdir()
    file = gguf.GGUFReader(adapter_file(lora, folder / "out", folder))
    said = file.get_field("adapter.lora.alpha")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    return float(said.parts[said.data[0]][0]), tensors


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("alpha", [6.0, 0.0])
def test_llama_cpp_gets_its_own_names_and_all_that_the_file_says(form, alpha, tmp_path):
    a, b = torch.randn(4, 16), torch.randn(8, 4)
    lora = write_lora(tmp_path / ("adapter" if form == "peft" else "lora"), form, {LAYER: LoraWeights(a, b, alpha)})
    said, tensors = written(lora, tmp_path)
    assert said == alpha
    assert tensors.keys() == {f"blk.1.ffn_down.weight.lora_{part}" for part in "ab"}
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], a)
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], b)


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_rows_of_q_and_k_have_the_order_of_llama_cpp(form, tmp_path):
    rows = torch.arange(8.0)[:, None]
    loras = {f"model.layers.0.self_attn.{part}_proj": LoraWeights(torch.ones(1, 4), rows, 1.0) for part in "qkv"}
    lora = write_lora(tmp_path / ("adapter" if form == "peft" else "lora"), form, loras)
    _, tensors = written(lora, tmp_path)
    found = {part: tensors[f"blk.0.attn_{part}.weight.lora_b"].flatten().tolist() for part in "qkv"}
    assert found == {"q": [0, 2, 1, 3, 4, 6, 5, 7], "k": [0, 4, 1, 5, 2, 6, 3, 7], "v": list(range(8))}
