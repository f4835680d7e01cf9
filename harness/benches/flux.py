"""diffusers' own FLUX transformer, tiny: one double block and one single block, q, k and v apart.

Black Forest Labs' model, for which most LoRAs are trained, has q, k and v (in single blocks the MLP too) in one layer;
`merged` says where its rows are in diffusers' layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.benches.bench import Bench, Noise
from harness.benches.layer import Rows

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
_NORMS = ("norm1.linear", "norm1_context.linear", "norm.linear")
_WIDTH, _MLP_WIDTH = 32, 128
_DOUBLE, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
_RENAMED = {
    "double_blocks.0.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0", _WIDTH),
    "double_blocks.0.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out", _WIDTH),
    "double_blocks.0.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj", _MLP_WIDTH),
    "double_blocks.0.img_mlp.2": (f"{_DOUBLE}.ff.net.2", _WIDTH),
    "double_blocks.0.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj", _MLP_WIDTH),
    "double_blocks.0.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2", _WIDTH),
    "double_blocks.0.img_mod.lin": (f"{_DOUBLE}.norm1.linear", 6 * _WIDTH),
    "double_blocks.0.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear", 6 * _WIDTH),
    "single_blocks.0.linear2": (f"{_SINGLE}.proj_out", _WIDTH),
    "single_blocks.0.modulation.lin": (f"{_SINGLE}.norm.linear", 3 * _WIDTH),
    "final_layer.linear": ("proj_out", 8),
}


def make() -> Any:
    """Build the transformer: width 32, 2 heads of 16, no guidance."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )


def run(model: Any, noise: Noise) -> Any:
    """Denoise a fixed latent of 2x2 patches with 3 text tokens; returns [1, 4, 8]."""
    latent = noise(1, 4, 8)
    return model(
        hidden_states=latent,
        encoder_hidden_states=noise(1, 3, 24),
        pooled_projections=noise(1, 12),
        timestep=torch.tensor([0.5]).to(latent),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0)).to(latent),
        txt_ids=torch.zeros(3, 3).to(latent),
        return_dict=False,
    )[0]


def merged() -> Mapping[str, Rows]:
    """Return where the rows of Black Forest Labs' layers are."""
    attention, single = f"{_DOUBLE}.attn", _SINGLE
    heads = [(f"{single}.attn.{name}", _WIDTH) for name in ("to_q", "to_k", "to_v")]
    stacked = {
        "double_blocks.0.img_attn.qkv": [(f"{attention}.{name}", _WIDTH) for name in ("to_q", "to_k", "to_v")],
        "double_blocks.0.txt_attn.qkv": [(f"{attention}.add_{name}_proj", _WIDTH) for name in "qkv"],
        "single_blocks.0.linear1": [*heads, (f"{single}.proj_mlp", _MLP_WIDTH)],
        **{name: [layer] for name, layer in _RENAMED.items()},
    }
    return {name: tuple((layer, slice(0, rows)) for layer, rows in parts) for name, parts in stacked.items()}


BENCHES = (Bench("flux", 22, make, (*_ATTENTION, *_MLP, *_NORMS), run, merged=merged),)
