"""A LoRA in its authors' names: diffusers' own loader must give each layer the rows that the placement gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor.match import place
from harness.files import read_lora
from harness.files.architectures import aliases

FLUX = {
    "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24,
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
# diffusers' model and its options, the mixin that loads LoRAs for it, the family of the names, part of the model
MODELS: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "flux2": (
        "Flux2Transformer2DModel",
        {**FLUX, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        "Flux2LoraLoaderMixin", "FLUX.2", "_blocks.",
    ),
    "wan": ("WanTransformer3DModel", WAN, "WanLoraLoaderMixin", "Wan", "blocks."),
    "wan-i2v": (
        "WanTransformer3DModel", {**WAN, "image_dim": 8, "added_kv_proj_dim": 24},
        "WanLoraLoaderMixin", "Wan", "blocks.",
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        },
        "HunyuanVideoLoraLoaderMixin", "HunyuanVideo", "transformer_blocks.0",
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        {
            "in_channels": 8, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 16,
            "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 24, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        "Krea2LoraLoaderMixin", "Krea 2", "transformer_blocks",
    ),
}  # fmt: skip
SHARED = {"FLUX.2": "_attn"}  # names that FLUX has too


def originals(model: torch.nn.Module, family: str, part: str) -> dict[str, tuple[int, int]]:
    """Return the authors' layers of a family, [out, in], that a model of diffusers has under names of its own."""
    found: dict[str, tuple[int, int]] = {}
    shapes = {name: layer.weight.shape for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, shape in shapes.items():
        for alias in aliases(name):
            shared = alias.row.family == "FLUX" and SHARED.get(family, "-") in alias.name
            if part in name and not alias.fused and (alias.row.family == family or shared):
                high = sum(shapes[other][0] for other in alias.others if other in shapes)
                found[alias.name] = (high, shape[1])
    return found


def deltas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    stems = {key.split(".lora_A")[0] for key in state if ".lora_A" in key}
    return {
        stem.removeprefix("transformer."): state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]
        for stem in stems
    }


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_loads_the_rows_that_are_placed(name: str, tmp_path: Path) -> None:
    made, options, mixin, family, part = MODELS[name]
    model = getattr(diffusers, made)(**options)
    torch.manual_seed(0)
    tensors, wanted = {}, {}
    for layer, (outputs, inputs) in originals(model, family, part).items():
        a, b = torch.randn(4, inputs), torch.randn(outputs, 4)
        tensors |= {f"diffusion_model.{layer}.lora_A.weight": a, f"diffusion_model.{layer}.lora_B.weight": b}
        wanted[layer] = b @ a
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = read_lora(tmp_path / "lora.safetensors")
    layers = {layer: tuple(m.weight.shape) for layer, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    placed = place(adapter, layers)
    assert len(placed.slots) == len(wanted) > 5, (placed.missing, placed.misfits, placed.ambiguous)
    loader = getattr(diffusers.loaders, mixin)
    loaded = deltas(loader.lora_state_dict({key: value.clone() for key, value in tensors.items()}))
    mine = {
        slot.layer: wanted[module][slice(*(slot.part or (None,)))]
        for module, slots in placed.slots.items()
        for slot in slots
    }
    assert mine.keys() == loaded.keys()
    for layer, delta in mine.items():
        assert torch.allclose(delta, loaded[layer], atol=1e-5), layer
