"""diffusers' own Qwen-Image transformer, tiny: two blocks or twelve, square and rectangular layers; its merged form."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from harness.benches.bench import Bench, Noise
from harness.benches.layer import Rows

MERGED = {"to_qkv": ("to_q", "to_k", "to_v"), "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}


class _SlicesOnce:
    """Stand in for to_q / to_k / to_v: run the merged layer once per attention call and hand out its thirds."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self._results: dict[str, tuple[torch.Tensor, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        for merged, parts in MERGED.items():
            if name in parts:
                return lambda hidden: self._slice(merged, parts.index(name), hidden)
        return getattr(self._attention, name)

    def _slice(self, merged: str, index: int, hidden: torch.Tensor) -> torch.Tensor:
        if merged not in self._results:
            self._results[merged] = getattr(self._attention, merged)(hidden).chunk(3, dim=-1)
        return self._results[merged][index]


class FusedQwenAttnProcessor(QwenDoubleStreamAttnProcessor2_0):  # type: ignore[misc]  # diffusers is untyped
    """diffusers' Qwen-Image attention, reading q, k and v from merged layers."""

    @functools.wraps(QwenDoubleStreamAttnProcessor2_0.__call__)  # diffusers passes only the arguments it finds here
    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Attend as the base class does, with merged layers in the place of the split ones."""
        return super().__call__(_SlicesOnce(attn), *args, **kwargs)


@torch.no_grad()
def fuse_qkv(model: torch.nn.Module) -> torch.nn.Module:
    """Merge q, k and v of every attention of a Qwen-Image transformer, in place; the forward stays the same.

    `to_qkv.weight: [3 * inner, dim]` stacks q, k, v in this order. Loading a merged checkpoint works the same way:
    fuse a fresh model, then `load_state_dict`.
    """
    for module in model.modules():
        if hasattr(module, "to_q") and hasattr(module, "add_q_proj"):
            for merged, parts in MERGED.items():
                setattr(module, merged, _stack([getattr(module, part) for part in parts]))
                for part in parts:
                    delattr(module, part)
            module.set_processor(FusedQwenAttnProcessor())  # type: ignore[operator]  # a diffusers Attention
    return model


def _stack(layers: list[torch.nn.Linear]) -> torch.nn.Linear:
    first, rows = layers[0], sum(layer.out_features for layer in layers)
    stacked = torch.nn.Linear(first.in_features, rows, first.bias is not None).to(first.weight)
    stacked.weight.copy_(torch.cat([layer.weight for layer in layers]))
    if first.bias is not None:
        stacked.bias.copy_(torch.cat([layer.bias for layer in layers]))
    return stacked


_MLP_AND_MODULATION = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1")
_COMMON = ("to_out.0", "to_add_out", *_MLP_AND_MODULATION, "txt_mod.1")
_SPLIT = tuple(part for parts in MERGED.values() for part in parts)
_ATTENTIONS, _WIDTH = [f"transformer_blocks.{block}.attn" for block in range(2)], 48


def make_split() -> Any:
    """Build the stock transformer: 2 blocks, width 48, 3 heads."""
    return _made(blocks=len(_ATTENTIONS), heads=3)


def make_deep() -> Any:
    """Build it with 12 blocks of width 16 and one head: `blocks.1` is the beginning of `blocks.10` and `blocks.11`."""
    return _made(blocks=12, heads=1)


def _made(blocks: int, heads: int) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


def make_fused() -> Any:
    """Build the same transformer with merged QKV; its forward equals the split form's."""
    return fuse_qkv(make_split())


def run(model: Any, noise: Noise) -> Any:
    """Denoise one fixed 4x4 latent with 5 text tokens; returns [1, 16, 16]."""
    latent = noise(1, 16, 16)
    return model(
        hidden_states=latent,
        encoder_hidden_states=noise(1, 5, 32),
        encoder_hidden_states_mask=None,
        timestep=torch.tensor([0.5]).to(latent),
        img_shapes=[(1, 4, 4)],
        return_dict=False,
    )[0]


def split_names() -> Mapping[str, Rows]:
    """Return where the rows of the stock model's q, k and v are in the merged layers."""
    return {
        f"{attention}.{part}": ((f"{attention}.{merged}", slice(i * _WIDTH, (i + 1) * _WIDTH)),)
        for merged, parts in MERGED.items()
        for attention in _ATTENTIONS
        for i, part in enumerate(parts)
    }


def merged_names() -> Mapping[str, Rows]:
    """Return where the rows of the merged layers are in the stock model."""
    return {
        f"{attention}.{merged}": tuple((f"{attention}.{part}", slice(0, _WIDTH)) for part in parts)
        for merged, parts in MERGED.items()
        for attention in _ATTENTIONS
    }


_THIRDS = tuple((name, 3) for name in MERGED)
BENCHES = (
    Bench("qwen-image", 20, make_split, (*_SPLIT, *_COMMON), run, merged=merged_names),
    Bench("qwen-image-fused", 20, make_fused, (*MERGED, *_COMMON), run, _THIRDS, split=split_names),
    Bench("qwen-image-deep", 25, make_deep, (*_SPLIT, *_COMMON), run),
)
