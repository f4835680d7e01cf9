"""diffusers' own Stable Diffusion UNet, tiny: convolutions of both sizes, self and cross attention."""

from __future__ import annotations

from typing import Any

from harness.benches.bench import Bench, Noise

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


def make() -> Any:
    """Build the UNet: 2 resolutions, widths 8 and 16, one attention block on either side and one in the middle."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )


def run(model: Any, noise: Noise) -> Any:
    """Denoise one fixed 8x8 latent with 5 text tokens; returns [1, 4, 8, 8]."""
    return model(noise(1, 4, 8, 8), 500, noise(1, 5, 12), return_dict=False)[0]


BENCHES = (Bench("sd-unet", 21, make, (*_ATTENTION, *_RESNET), run, component="unet"),)
