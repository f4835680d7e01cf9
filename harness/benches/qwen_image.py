"""diffusers' own Qwen-Image transformer, tiny: two blocks, square and rectangular layers; and its merged-QKV form."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from harness.benches.bench import Bench
from harness.benches.view import Pieces

_MLP_AND_MODULATION = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1")
_COMMON = ("to_out.0", "to_add_out", *_MLP_AND_MODULATION, "txt_mod.1")
_SPLIT = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_MERGED = ("to_qkv", "add_qkv_proj")
_BLOCKS, _WIDTH = 2, 48
_WEIGHT_SEED = 20


def make_split() -> torch.nn.Module:
    """Build the stock transformer: 2 blocks, width 48, 3 heads."""
    from diffusers import QwenImageTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHT_SEED)
        model: torch.nn.Module = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=_BLOCKS,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        )
    return model


def make_fused() -> torch.nn.Module:
    """Build the same transformer with merged QKV; its forward equals the split form's."""
    from harness.benches.fused_qkv import fuse_qkv

    return fuse_qkv(make_split())


def run(model: torch.nn.Module) -> torch.Tensor:
    """Denoise one fixed 4x4 latent with 5 text tokens; returns [1, 16, 16]."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    output: torch.Tensor = model(
        hidden_states=noise(1, 16, 16),
        encoder_hidden_states=noise(1, 5, 32),
        encoder_hidden_states_mask=None,
        timestep=torch.tensor([0.5]).to(weight),
        img_shapes=[(1, 4, 4)],
        return_dict=False,
    )[0]
    return output


def split_names() -> Mapping[str, Pieces]:
    """Return where the rows of the stock model's q, k and v are in the merged layers."""
    return {
        f"transformer_blocks.{block}.attn.{part}": (
            (f"transformer_blocks.{block}.attn.{merged}", slice(i * _WIDTH, (i + 1) * _WIDTH)),
        )
        for merged, parts in zip(_MERGED, (_SPLIT[:3], _SPLIT[3:]), strict=True)
        for block in range(_BLOCKS)
        for i, part in enumerate(parts)
    }


def merged_names() -> Mapping[str, Pieces]:
    """Return where the rows of the merged layers are in the stock model."""
    whole = slice(0, _WIDTH)
    return {
        f"transformer_blocks.{block}.attn.{merged}": tuple(
            (f"transformer_blocks.{block}.attn.{part}", whole) for part in parts
        )
        for merged, parts in zip(_MERGED, (_SPLIT[:3], _SPLIT[3:]), strict=True)
        for block in range(_BLOCKS)
    }


BENCHES = (
    Bench("qwen-image", make_split, (*_SPLIT, *_COMMON), run, merged=merged_names),
    Bench(
        "qwen-image-fused",
        make_fused,
        (*_MERGED, *_COMMON),
        run,
        tuple((name, 3) for name in _MERGED),
        split=split_names,
    ),
)
