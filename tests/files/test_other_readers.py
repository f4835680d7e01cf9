"""What we write in the remaining formats does in a real reader what the file says, wherever one runs on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_conversion_utils import (
    _convert_lycoris_flux2_lokr_to_diffusers,
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_lokr_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft
from safetensors.torch import load_file
from torch import nn

from harness.files import FORMATS, LoraAdapter, LoraParts, LoraWeights, match_modules, read_lora, write_lora
from tests import closed_form as variants


def delta(adapter: LoraAdapter, name: str) -> torch.Tensor:
    a, b = adapter.tensors(name)
    return adapter.modules[name].trained_scale * (b.double() @ a.double())


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < 1e-5, error


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@torch.no_grad()
def test_attention_processors_load_into_a_unet(tmp_path: Path) -> None:
    model, base = unet(), unet()
    names = [name for name, _ in model.named_modules() if name.endswith(("attn1.to_q", "attn2.to_out.0"))]
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    made = {n: LoraWeights(torch.randn(2, i), torch.randn(o, 2), None) for n, (o, i) in shapes.items()}
    path = write_lora(tmp_path / "x", "attn-procs", made)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(path))
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=model)
    model.fuse_lora()
    model.unload_lora()
    adapter = read_lora(path)
    assert set(adapter.modules) == set(names)
    for name in names:
        assert_same(model.get_submodule(name).weight - base.get_submodule(name).weight, delta(adapter, name))


def test_old_text_encoder_names_are_the_ones_diffusers_converts_to(tmp_path: Path) -> None:
    names = ("to_q", "to_k", "to_v", "to_out")
    stem = "text_model.encoder.layers.0.self_attn"
    keys = [f"{stem}.{name}_lora.{half}.weight" for name in names for half in ("down", "up")]
    converted = convert_all_state_dict_to_peft({key: torch.zeros(1) for key in keys})
    naming = FORMATS["attn-procs"].naming
    assert naming is not None
    ours = {naming.read(f"{stem}.{name}_lora", "down.weight") for name in names}
    assert ours == {key.split(".lora_")[0] for key in converted}


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_musubi_files_of_wan_have_alpha_over_rank(tmp_path: Path, alpha: float) -> None:
    attention = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
    names = [f"blocks.0.{layer}" for layer in (*attention, "ffn.0", "ffn.2")]
    made = {name: LoraWeights(torch.randn(4, 5), torch.randn(6, 4), alpha) for name in names}
    path = write_lora(tmp_path / "x", "kohya", made)
    adapter = read_lora(path)
    assert adapter.dialect == "musubi"
    found = _convert_musubi_wan_lora_to_diffusers(load_file(path))
    matched, _ = match_modules(adapter, names)
    places = {
        "blocks.0.self_attn.q": "attn1.to_q",
        "blocks.0.cross_attn.o": "attn2.to_out.0",
        "blocks.0.ffn.2": "ffn.net.2",
    }
    for name, model_name in matched.items():
        if place := places.get(model_name):
            a, b = (found[f"transformer.blocks.0.{place}.lora_{half}.weight"] for half in "AB")
            assert_same(b @ a, delta(adapter, name))


def test_lokr_alpha_is_baked_by_diffusers_as_we_read_it(tmp_path: Path) -> None:
    parts = {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}
    made = LoraParts({role: torch.randn(shape) for role, shape in parts.items()}, 6.0)
    path = write_lora(tmp_path / "x", "comfyui", {"layers.0.attention.to_q": made})
    module = read_lora(path).modules["layers.0.attention.to_q"]
    stem = "transformer.layers.0.attention.to_q"
    found = {
        key.removeprefix(f"{stem}."): t for key, t in _convert_non_diffusers_lokr_to_diffusers(load_file(path)).items()
    }
    baked = variants.lokr_product([found["lokr_w1"]], [found["lokr_w2_a"], found["lokr_w2_b"]])
    raw = variants.lokr_product([made.parts["lokr_w1"]], [made.parts["lokr_w2_a"], made.parts["lokr_w2_b"]])
    assert module.trained_scale == 3.0
    assert_same(baked, module.trained_scale * raw)


def test_simpletuner_lokr_names_are_the_diffusers_names_flattened(tmp_path: Path) -> None:
    made = LoraParts({"lokr_w1": torch.randn(2, 3), "lokr_w2": torch.randn(4, 5)}, 6.0)
    name = "transformer_blocks.3.attn.to_q"
    path = write_lora(tmp_path / "x", "kohya", {name: made}, prefix="lycoris_")
    adapter = read_lora(path)
    found = _convert_lycoris_flux2_lokr_to_diffusers(load_file(path))
    assert (adapter.dialect, match_modules(adapter, [name])[0]) == ("lycoris", {name.replace(".", "_"): name})
    assert torch.equal(found[f"transformer.{name}.lokr_w1"], made.parts["lokr_w1"])  # both full: alpha scales nothing
    assert adapter.modules[name.replace(".", "_")].trained_scale == 1.0


def test_a_comfyui_bias_difference_is_a_bias_without_scale_in_diffusers(tmp_path: Path) -> None:
    parts = {"A": torch.randn(4, 5), "B": torch.randn(6, 4), "diff_b": torch.randn(6)}
    name = "blocks.0.self_attn.q"
    path = write_lora(tmp_path / "x", "comfyui", {name: LoraParts(parts, 2.0)})
    adapter = read_lora(path)
    found = _convert_non_diffusers_wan_lora_to_diffusers(load_file(path))
    stem = "transformer.blocks.0.attn1.to_q"
    assert torch.equal(found[f"{stem}.lora_B.bias"], adapter.part(name, "diff_b"))
    assert_same(found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"], delta(adapter, name))


LYCORIS = {
    "lora": {"A": (4, 6), "B": (8, 4)},
    "dora": {"A": (4, 6), "B": (8, 4), "magnitude": (8, 1)},
    "tucker": {"A": (4, 6, 1, 1), "B": (8, 4, 1, 1), "mid": (4, 4, 3, 3)},
}


@pytest.mark.parametrize("variant", sorted(LYCORIS))
@torch.no_grad()
def test_lycoris_merges_the_written_variants(tmp_path: Path, variant: str) -> None:
    lycoris = pytest.importorskip("lycoris")
    model = nn.Module()
    model.layer = nn.Conv2d(6, 8, 3) if variant == "tucker" else nn.Linear(6, 8)
    base = model.layer.weight.clone()
    parts = {role: torch.rand(shape) + 0.5 for role, shape in LYCORIS[variant].items()}
    path = write_lora(tmp_path / "x", "kohya", {"layer": LoraParts(parts, 6.0)}, prefix="lycoris_")
    adapter = read_lora(path)
    module = adapter.modules["layer"]
    assert (adapter.dialect, module.variant, module.trained_scale) == ("lycoris", variant, 1.5)
    product = variants.conv_product(parts["A"], parts["B"])
    if variant == "tucker":
        product = variants.tucker_product(parts["A"], parts["B"], parts["mid"])
    expected = base.double() + 1.5 * product
    if variant == "dora":
        expected = variants.dora_weight(base, 1.5 * product, parts["magnitude"])
    network, _ = lycoris.create_lycoris_from_weights(1.0, None, model, weights_sd=load_file(path))
    network.merge_to(1.0)
    assert_same(model.layer.weight, expected)


def test_the_product_that_is_read_of_mlx_lm_s_embedding_is_its_own(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    layers = pytest.importorskip("mlx.nn")
    lora = pytest.importorskip("mlx_lm.tuner.lora")
    layer = lora.LoRAEmbedding.from_base(layers.Embedding(9, 5), r=2, scale=3.0)
    layer.lora_b = mx.random.normal((2, 5))
    halves = {"embed_tokens.lora_a": layer.lora_a, "embed_tokens.lora_b": layer.lora_b}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), halves)
    said = '{"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0}}'
    (tmp_path / "adapter_config.json").write_text(said)
    added = layer.fuse().weight - layer.embedding.weight
    adapter = read_lora(tmp_path)
    a, b = (part.double() for part in adapter.tensors("embed_tokens"))
    module = adapter.modules["embed_tokens"]
    assert (module.variant, module.rank, module.trained_scale) == ("embedding", 2, 3.0)
    assert_same(torch.tensor(added.tolist()), 3.0 * (b @ a).T)  # PEFT's way: A: [r, tokens], B: [out, r]


def test_the_product_that_is_read_of_mlx_vlm_s_file_is_its_own(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    layers = pytest.importorskip("mlx.nn")
    lora = pytest.importorskip("mlx_vlm.trainer.peft.lora")
    layer = lora.LoRaLayer(layers.Linear(5, 6, bias=False), 3, alpha=0.5)
    layer.B = mx.random.normal((3, 6))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"q.A": layer.A, "q.B": layer.B})
    (tmp_path / "adapter_config.json").write_text('{"rank": 3, "alpha": 0.5, "dropout": 0.0}')
    added = layer.eval()(mx.eye(5)) - layer.original_layer(mx.eye(5))
    adapter = read_lora(tmp_path)
    a, b = (part.double() for part in adapter.tensors("q"))
    assert_same(torch.tensor(added.tolist()).T, 0.5 / 3 * b @ a)  # of 0.5.0 and later; up to 0.4.4 it was 0.5
    assert (adapter.alpha_by_release, adapter.modules["q"].alpha) == ((0.5, 3), None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlx_lm_loads_and_fuses_the_written_folder(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    layers = pytest.importorskip("mlx.nn")
    utils = pytest.importorskip("mlx_lm.tuner.utils")

    class Model(layers.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = [layers.Linear(5, 6), layers.Linear(6, 4)]

    model = Model()
    shapes = {"layers.0": (6, 5), "layers.1": (4, 6)}
    before = {name: torch.tensor(model.layers[i].weight.tolist()) for i, name in enumerate(shapes)}
    made = {n: LoraWeights(torch.randn(3, i), torch.randn(o, 3), 7.5) for n, (o, i) in shapes.items()}
    path = write_lora(tmp_path / "x", "mlx", made)
    utils.load_adapters(model, str(path))
    mx.eval(model.parameters())
    adapter = read_lora(path)
    for i, name in enumerate(shapes):
        fused = torch.tensor(model.layers[i].fuse().weight.tolist())
        assert_same(fused - before[name], delta(adapter, name))
        assert_same(delta(adapter, name), 2.5 * (made[name].b.double() @ made[name].a.double()))
