"""Files with text encoders stay one file, and layers that a model splits or stacks go where the model has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import Flux2LoraLoaderMixin, FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from harness.doctor import repair_file
from harness.doctor.repair.naming import layers_from
from harness.errors import UserError
from harness.files import LoraWeights, read_lora, write_lora

ENDS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj", "fc1", "fc2")
Weights = dict[str, Tensor]


def unet(context: int) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=context,
    )  # fmt: skip


def clip(kind: Any, width: int) -> Any:
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 40, "bos_token_id": 38, "eos_token_id": 39, "max_position_embeddings": 12}
    return kind(CLIPTextConfig(**sizes, **tokens, projection_dim=8))


SD = {"unet": lambda: unet(768), "text_encoder": lambda: clip(CLIPTextModel, 768)}
SDXL = {
    "unet": lambda: unet(2048),
    "text_encoder": lambda: clip(CLIPTextModel, 768),
    "text_encoder_2": lambda: clip(CLIPTextModelWithProjection, 1280),
}
MODELS = {"sd": SD, "sdxl": SDXL}
KOHYA = {
    "sd": {"unet": "unet", "text_encoder": "te"},
    "sdxl": {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"},
}


def pipeline(model: str) -> Any:
    parts = {name: make() for name, make in MODELS[model].items()}
    others = dict.fromkeys(("vae", "tokenizer", "scheduler", "feature_extractor", "image_encoder"))
    if model == "sd":
        others |= {"safety_checker": None, "requires_safety_checker": False}  # type: ignore[dict-item]
        return StableDiffusionPipeline(**parts, **others)
    return StableDiffusionXLPipeline(**parts, **others, tokenizer_2=None, add_watermarker=False)


def full(name: str) -> str:
    """Return the name that files give a layer: CLIP had a `text_model` before transformers 5."""
    first = name.split(".")[0]
    return f"text_model.{name}" if first == "encoder" else name


def layers_of(module: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name.endswith(ENDS)
    }


def drawn(rows: int, columns: int, place: int, rank: int = 4) -> LoraWeights:
    """Draw a pair; diffusers takes one alpha for all layers of a kohya file, so ranks, which become it, are equal."""
    generator = torch.Generator().manual_seed(place)
    a, b = (0.1 * torch.randn(size, generator=generator) for size in ((rank, columns), (rows, rank)))
    return LoraWeights(a, b, (1.0, 4.0, 8.0)[place % 3])


def delta(one: LoraWeights, alpha: float | None = None) -> Tensor:
    return (alpha or one.alpha or 0.0) / one.rank * (one.b @ one.a)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in linears(model).items()}


def kohya_file(model: str, path: Path) -> tuple[Path, Weights]:
    """Write the LoRA of all components as kohya does, and return what it adds to each layer."""
    tensors, truth = {}, {}
    for component, module in ((name, make()) for name, make in MODELS[model].items()):
        for place, (name, layer) in enumerate(layers_of(module).items()):
            one = drawn(layer.out_features, layer.in_features, place)
            stem = f"lora_{KOHYA[model][component]}_{full(name).replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": one.a, f"{stem}.lora_up.weight": one.b}
            tensors[f"{stem}.alpha"] = torch.tensor(one.alpha)
            truth[f"{component}:{name}"] = delta(one)
    save_file(tensors, path, metadata={"ss_network_alpha": "8", "ss_base_model_version": "x", "sshs_model_hash": "y"})
    return path, truth


def diffusers_changes(model: str, path: str | Path) -> Weights:
    """Return what diffusers adds to every layer of every component when it loads and fuses the file."""
    pipe = pipeline(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers names alphas of kohya files as no PEFT pattern does
        pipe.load_lora_weights(str(path))
    pipe.fuse_lora(components=list(MODELS[model]))
    found = {}
    for component, make in MODELS[model].items():
        base = layers_of(make())
        for name, layer in base.items():
            after = getattr(pipe, component).get_submodule(name)
            found[f"{component}:{name}"] = (after.base_layer if hasattr(after, "base_layer") else after).weight
            found[f"{component}:{name}"] = found[f"{component}:{name}"].detach() - layer.weight.detach()
    return found


def agree(found: Weights, truth: Weights) -> None:
    assert found.keys() == truth.keys()
    for name, wanted in truth.items():
        assert torch.allclose(found[name], wanted, atol=1e-5), name


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules()]


@pytest.mark.parametrize("model", MODELS)
def test_a_file_with_text_encoders_stays_one_file(tmp_path: Path, model: str) -> None:
    source, truth = kohya_file(model, tmp_path / "old.safetensors")
    report = repair_file(source, "kohya", tmp_path / "new")
    assert {key.rpartition(".")[0] for key in load_file(source)} == {
        key.rpartition(".")[0] for key in load_file(report.path)
    }
    agree(diffusers_changes(model, report.path), truth)
    assert read_lora(report.path).metadata == {"ss_base_model_version": "x"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("through", ["diffusers", "comfyui"])
def test_it_goes_to_another_format_and_back(tmp_path: Path, model: str, through: str) -> None:
    source, truth = kohya_file(model, tmp_path / "old.safetensors")
    there = repair_file(source, through, tmp_path / "there", model_names=names(MODELS[model]["unet"]()))
    if through == "diffusers":
        agree(diffusers_changes(model, there.path), truth)
    back = repair_file(there.path, "kohya", tmp_path / "back")
    assert load_file(back.path).keys() == load_file(source).keys()
    agree(diffusers_changes(model, back.path), truth)
    again = repair_file(there.path, "diffusers", tmp_path / "again")
    agree(diffusers_changes(model, again.path), truth)


def test_comfyui_has_its_names_for_the_text_encoders(tmp_path: Path) -> None:
    source, _ = kohya_file("sdxl", tmp_path / "old.safetensors")
    there = repair_file(source, "comfyui", tmp_path / "new", model_names=names(SDXL["unet"]()))
    keys = load_file(there.path)
    for encoder in ("clip_l", "clip_g"):
        assert f"text_encoders.{encoder}.transformer.text_model.encoder.layers.1.mlp.fc1.lora_A.weight" in keys


def test_text_encoders_alone_stay_apart(tmp_path: Path) -> None:
    source, _ = kohya_file("sdxl", tmp_path / "old.safetensors")
    encoders = {key: one for key, one in load_file(source).items() if "unet" not in key}
    save_file(encoders, source)
    there = repair_file(source, "comfyui", tmp_path / "there")
    back = repair_file(repair_file(there.path, "diffusers", tmp_path / "again").path, "kohya", tmp_path / "back")
    assert load_file(back.path).keys() == encoders.keys()


@pytest.mark.parametrize("to", ["peft", "diffsynth", "mlx", "gguf", "xlabs"])
def test_a_format_of_one_component_is_refused(tmp_path: Path, to: str) -> None:
    source, _ = kohya_file("sd", tmp_path / "old.safetensors")
    with pytest.raises(UserError, match="several components"):
        repair_file(source, to, tmp_path / "new")


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


FUSED = {
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.0.txt_attn.qkv": (96, 32),
    "double_blocks.0.img_attn.proj": (32, 32),
    "double_blocks.0.img_mlp.0": (128, 32),
    "single_blocks.0.linear1": (3 * 32 + 128, 32),
    "single_blocks.0.linear2": (32, 32 + 128),
}


def fused_lora(names: Iterable[str] = FUSED) -> dict[str, LoraWeights]:
    return {name: drawn(*FUSED[name], place, 2 + place % 2) for place, name in enumerate(names)}


def split(lora: dict[str, LoraWeights]) -> Weights:
    """Return what the layers of diffusers' FLUX get from the fused ones."""
    whole = {name: delta(one) for name, one in lora.items()}
    block, single = "transformer_blocks.0", "single_transformer_blocks.0"
    qkv = {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}
    found = {
        f"{block}.attn.{layer}": whole[f"double_blocks.0.{part}.qkv"][32 * place : 32 * place + 32]
        for part, layers in qkv.items()
        for place, layer in enumerate(layers)
    }
    found[f"{block}.attn.to_out.0"] = whole["double_blocks.0.img_attn.proj"]
    found[f"{block}.ff.net.0.proj"] = whole["double_blocks.0.img_mlp.0"]
    slices = zip((*(f"attn.to_{one}" for one in "qkv"), "proj_mlp"), (0, 32, 64, 96), (32, 64, 96, 224), strict=True)
    for layer, start, stop in slices:
        found[f"{single}.{layer}"] = whole["single_blocks.0.linear1"][start:stop]
    return found | {f"{single}.proj_out": whole["single_blocks.0.linear2"]}


def flux_changes(path: str, model: Any, mixin: Any) -> Weights:
    before = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    found = mixin.lora_state_dict(path, return_lora_metadata=True)
    alphas = {"network_alphas": None} if mixin is FluxLoraLoaderMixin else {}
    mixin.load_lora_into_transformer(found[0], transformer=model, metadata=found[-1], **alphas)
    model.fuse_lora()
    after = {name.removesuffix(".base_layer"): layer.weight.detach() for name, layer in linears(model).items()}
    changes = {name: after[name] - weight for name, weight in before.items()}
    return {name: change for name, change in changes.items() if change.any()}


@pytest.mark.parametrize("source", ["kohya", "comfyui", "diffsynth"])
def test_fused_layers_are_split_for_the_model_that_has_them_so(tmp_path: Path, source: str) -> None:
    lora, model = fused_lora(), flux()
    path = write_lora(tmp_path / "old", source, lora)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    report = repair_file(path, "diffusers", tmp_path / "new", model_names=layers_from(tmp_path / "base.safetensors"))
    agree(flux_changes(report.path, model, FluxLoraLoaderMixin), split(lora))


def test_split_layers_are_stacked_for_the_model_that_has_them_so(tmp_path: Path) -> None:
    lora = fused_lora()
    apart = write_lora(tmp_path / "fused", "comfyui", lora)
    layers = shapes(flux())
    there = repair_file(apart, "diffusers", tmp_path / "apart", model_names=layers)
    back = read_lora(repair_file(there.path, "comfyui", tmp_path / "back", model_names=FUSED).path)
    assert {module.name for module in back.modules.values()} == set(FUSED)
    for name, one in lora.items():
        a, b = back.tensors(name)
        assert back.modules[name].alpha == back.modules[name].rank
        assert torch.allclose(b @ a, delta(one), atol=1e-6)


def test_rows_that_the_model_has_no_layer_for_are_refused(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "comfyui", fused_lora(["single_blocks.0.linear1"]))
    layers = shapes(flux())
    del layers["single_transformer_blocks.0.proj_mlp"]
    with pytest.raises(UserError):
        repair_file(path, "diffusers", tmp_path / "new", model_names=layers)


def test_a_base_that_has_none_of_the_modules_is_refused(tmp_path: Path) -> None:
    path = write_lora(
        tmp_path / "old", "diffusers", {"blocks.0.to_q": LoraWeights(torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    )
    with pytest.raises(UserError, match="none of its 1 module fits a layer"):
        repair_file(path, "diffusers", tmp_path / "new", model_names=["other.0.to_k"])
    some = repair_file(path, "diffusers", tmp_path / "new", model_names=["blocks.0.to_q", "x"])
    assert not some.notes


def test_flux2_as_diffsynth_saves_it_is_read_by_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    ends = ("to_q", "to_out.0", "add_q_proj", "linear_in", "to_qkv_mlp_proj", "attn.to_out")
    tensors, truth = {}, {}
    for place, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(ends):
            one = drawn(layer.out_features, layer.in_features, place)
            tensors |= {f"{name}.lora_A.default.weight": one.a, f"{name}.lora_B.default.weight": one.b}
            truth[name] = delta(one, 4.0)
    save_file(tensors, tmp_path / "old.safetensors")
    report = repair_file(tmp_path / "old.safetensors", "diffusers", tmp_path / "new", lora_alpha=4.0)
    agree(flux_changes(report.path, model, Flux2LoraLoaderMixin), truth)
