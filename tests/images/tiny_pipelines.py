"""Untrained pipelines of the classes people use, small enough to save and draw with in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


def stable_diffusion(folder: Path) -> Path:
    """Save a StableDiffusionPipeline (SD 1.5)."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=_vae(4), text_encoder=CLIPTextModel(_clip()), tokenizer=_clip_tokenizer(folder), unet=_unet(32),
        scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return _save(pipe, folder)


def stable_diffusion_xl(folder: Path) -> Path:
    """Save a StableDiffusionXLPipeline."""
    torch.manual_seed(0)
    unet = _unet(
        64, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=CLIPTextModel(_clip()), text_encoder_2=CLIPTextModelWithProjection(_clip()),
        tokenizer=_clip_tokenizer(folder), tokenizer_2=_clip_tokenizer(folder), unet=unet,
        scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    return _save(pipe, folder)


def flux(folder: Path) -> Path:
    """Save a FluxPipeline."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2))
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), _vae(4, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
        CLIPTextModel(_clip()), _clip_tokenizer(folder), t5, _word_tokenizer(), transformer,
    )  # fmt: skip
    return _save(pipe, folder)


def qwen_image(folder: Path) -> Path:
    """Save a QwenImagePipeline with a text encoder."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}, "rope_theta": 1e6,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
    }  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, _word_tokenizer(), transformer)
    return _save(pipe, folder)


def wan(folder: Path) -> Path:
    """Save a WanPipeline, which draws videos."""
    torch.manual_seed(0)
    t5 = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2))
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    transformer.proj_out.weight.data *= 20.0  # untrained, it moves the latents too little for the VAE to show
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return _save(WanPipeline(_word_tokenizer(), t5, vae, scheduler, transformer), folder)


ALL: dict[str, Callable[[Path], Path]] = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "flux": flux,
    "qwen-image": qwen_image,
    "wan": wan,
}


def _save(pipe: object, folder: Path) -> Path:
    pipe.save_pretrained(folder / "pipe")  # type: ignore[attr-defined]
    return folder / "pipe"


def _unet(width: int, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, **more,
    )  # fmt: skip


def _vae(channels: int, **more: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    )  # fmt: skip


def _clip() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=32, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "red", "cat", "on", "a", "mat"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
