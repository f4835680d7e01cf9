"""A file for several parts of a pipeline, each of which the tools read by itself: the tool's own code is the judge."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor import inspect_file

pytest.importorskip("diffusers")


def parts_file(unet: float, te: float, odd: float, width: int, inner: int) -> dict[str, torch.Tensor]:
    """Return a kohya file of a UNet and a text encoder; `odd` is the alpha of the encoder's q_proj."""
    layers = [(f"lora_te_text_model_encoder_layers_0_self_attn_{name}_proj", inner, te) for name in ("k", "v", "out")]
    layers += [("lora_te_text_model_encoder_layers_0_self_attn_q_proj", inner, odd)]
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to"
    layers += [(f"{block}_{name}", width, unet) for name in "qk"]
    halves = {f"{name}.lora_down.weight": torch.randn(4, size) for name, size, _ in layers}
    halves |= {f"{name}.lora_up.weight": torch.randn(size, 4) for name, size, _ in layers}
    return halves | {f"{name}.alpha": torch.tensor(alpha) for name, _, alpha in layers}


@pytest.mark.parametrize("odd", [1.0, 2.0])
def test_diffusers_has_one_alpha_for_each_part_of_the_pipeline(odd: float, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=99, bos_token_id=0, eos_token_id=1))
    keys, alphas = Mixin.lora_state_dict(parts_file(4.0, 1.0, odd, 64, 32), unet_config=unet.config)
    Mixin.load_lora_into_unet(keys, alphas, unet, adapter_name="a")
    with warnings.catch_warnings():  # "alpha_pattern keys did not match any targeted module"
        warnings.simplefilter("ignore")
        Mixin.load_lora_into_text_encoder(keys, alphas, encoder, adapter_name="a")
    scales = {m.scaling["a"] for model in (unet, encoder) for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {1.0, 0.25}  # of a q_proj with alpha 2 too
    save_file(parts_file(4.0, 1.0, odd, 640, 768), tmp_path / "real_sizes.safetensors")
    right = inspect_file(tmp_path / "real_sizes.safetensors").prescription["diffusers"]
    assert right == (1.0 if odd == 1 else None)
