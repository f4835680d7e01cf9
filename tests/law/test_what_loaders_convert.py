"""The names that diffusers is said to convert are converted by diffusers' own code, the others are not, or not all."""

from __future__ import annotations

import re
from collections.abc import Mapping

import diffusers.loaders as mixins
import pytest
import torch

from harness.files import LoraModule
from harness.law.known import not_applied

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
SAMPLES: Mapping[str, tuple[str, str, tuple[str, str], tuple[str, ...]]] = {
    "sdxl": (
        "StableDiffusionXLLoraLoaderMixin", "kohya", KOHYA,
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        ),
    ),
    "flux": (
        "FluxLoraLoaderMixin", "kohya", KOHYA,
        (
            "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_txt_mlp_0",
            "lora_unet_double_blocks_0_img_mod_lin", "lora_unet_single_blocks_0_linear1",
            "lora_unet_single_blocks_0_modulation_lin", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        ),
    ),
    "wan by musubi": (
        "WanLoraLoaderMixin", "kohya", KOHYA,
        (*(f"lora_unet_blocks_0_{kind}_attn_{one}" for kind in ("self", "cross") for one in "qkvo"),
         "lora_unet_blocks_0_ffn_0", "lora_unet_blocks_0_ffn_2"),
    ),
    "qwen": (
        "QwenImageLoraLoaderMixin", "kohya", KOHYA,
        ("lora_unet_transformer_blocks_0_attn_to_out_0", "lora_unet_transformer_blocks_0_attn_add_q_proj",
         "lora_unet_transformer_blocks_0_img_mlp_net_0_proj", "lora_unet_transformer_blocks_0_img_mod_1"),
    ),
    "z-image": (
        "ZImageLoraLoaderMixin", "kohya", KOHYA,
        ("lora_unet_layers_0_attention_to_q", "lora_unet_layers_0_attention_to_out_0",
         "lora_unet_layers_0_feed_forward_w1", "lora_unet_noise_refiner_0_adaLN_modulation_0"),
    ),
    "wan": (
        "WanLoraLoaderMixin", "comfyui", PEFT,
        ("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.cross_attn.o",
         "diffusion_model.blocks.0.ffn.0"),
    ),
    "ltx": (
        "LTX2LoraLoaderMixin", "comfyui", PEFT,
        ("diffusion_model.transformer_blocks.0.attn1.to_q", "diffusion_model.transformer_blocks.0.ff.net.2"),
    ),
    "qwen of ComfyUI": (
        "QwenImageLoraLoaderMixin", "comfyui", KOHYA, ("diffusion_model.transformer_blocks.0.attn.to_q",),
    ),
    "z-image of ComfyUI": (
        "ZImageLoraLoaderMixin", "comfyui", PEFT,
        ("diffusion_model.layers.0.attention.to_q", "diffusion_model.layers.0.adaLN_modulation.0"),
    ),
    "qwen by DiffSynth": ("QwenImageLoraLoaderMixin", "diffsynth", NAMED, ("transformer_blocks.0.attn.to_q",)),
    "z-image by DiffSynth": ("ZImageLoraLoaderMixin", "diffsynth", NAMED, ("layers.0.attention.to_q",)),
}  # fmt: skip


class File:
    """What `not_applied` looks at."""

    def __init__(self, format: str, names: tuple[str, ...], spelling: tuple[str, str]) -> None:
        self.format, self.config, self.problems = format, {}, ()
        self.modules = {
            name: LoraModule(name, 4, 8, 8, 4.0, False, "F32", {"A": f"{name}.{spelling[0]}"}) for name in names
        }


@pytest.mark.parametrize("name", SAMPLES)
def test_diffusers_converts_what_it_is_said_to(name: str) -> None:
    mixin, format, spelling, modules = SAMPLES[name]
    state = {}
    for module in modules:
        rows = 3072 * 7 if module.endswith("linear1") else 9216
        state[f"{module}.{spelling[0]}"], state[f"{module}.{spelling[1]}"] = torch.randn(4, 8), torch.randn(rows, 4)
        if spelling is KOHYA:
            state[f"{module}.alpha"] = torch.tensor(4.0)
    converted = getattr(mixins, mixin).lora_state_dict(state)
    converted = converted[0] if isinstance(converted, tuple) else converted
    assert len(converted) >= 2 * len(modules)
    assert all(re.match(r"(transformer|unet|text_encoder(_2)?)\.", key) for key in converted)
    assert not [key for key in converted if key.endswith(".alpha")]
    assert not_applied(File(format, modules, spelling), "diffusers") == ""


@pytest.mark.parametrize(
    ("format", "modules"),
    [
        ("kohya", ("lora_unet_blocks_0_cross_attn_k_proj",)),
        ("kohya", ("lora_unet_joint_blocks_0_x_block_attn_qkv",)),
        ("kohya", ("lora_transformer_transformer_blocks_0_attn_to_q",)),
        ("kohya", ("lycoris_transformer_blocks_0_attn_to_q",)),
        ("kohya", ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in")),
        ("comfyui", ("diffusion_model.double_blocks.0.img_attn.qkv",)),
        ("diffsynth", ("blocks.0.attn.qkv_proj",)),
        ("kohya", ("lora_unet__orig_mod_blocks_0_self_attn_q",)),
    ],
)
def test_of_other_names_nothing_is_promised(format: str, modules: tuple[str, ...]) -> None:
    assert not_applied(File(format, modules, PEFT), "diffusers")


@pytest.mark.parametrize("part", ["dora_scale", "hada_w1_a", "lokr_w1", "diff", "w_norm", "oft_blocks", "on_input"])
def test_of_other_parts_than_pairs_nothing_is_promised(part: str) -> None:
    variant = {"dora_scale": "dora", "hada_w1_a": "loha", "lokr_w1": "lokr", "w_norm": "norm", "diff": "diff",
               "oft_blocks": "oft", "on_input": "ia3"}[part]  # fmt: skip
    file = File("kohya", ("lora_unet_down_blocks_0_x",), KOHYA)
    key = f"lora_unet_down_blocks_0_x.{part}"
    file.modules = {name: module.changed(variant=variant, keys={part: key}) for name, module in file.modules.items()}
    assert not_applied(file, "diffusers")
