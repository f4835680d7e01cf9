"""diffusers' own Stable Diffusion UNet, tiny: convolutions of both sizes, self and cross attention."""

from __future__ import annotations

import torch

from harness.benches.bench import Bench

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
_WEIGHT_SEED = 21


def make() -> torch.nn.Module:
    """Build the UNet: 2 resolutions, widths 8 and 16, one attention block on either side and one in the middle."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHT_SEED)
        model: torch.nn.Module = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=12,
        )
    return model


def run(model: torch.nn.Module) -> torch.Tensor:
    """Denoise one fixed 8x8 latent with 5 text tokens; returns [1, 4, 8, 8]."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 4, 8, 8, generator=generator).to(weight)
    text = torch.randn(1, 5, 12, generator=generator).to(weight)
    output: torch.Tensor = model(latent, 500, text, return_dict=False)[0]
    return output


BENCHES = (Bench("sd-unet", make, (*_ATTENTION, *_RESNET), run, component="unet"),)
