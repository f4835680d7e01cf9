"""Merged QKV for diffusers' Qwen-Image transformer: one `to_qkv` and one `add_qkv_proj` Linear per attention.

diffusers' own `fuse_projections` creates layers its Qwen processor never reads; here the split layers are gone and the
merged ones carry the forward, as in the model of the founding report.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

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
    first = layers[0]
    rows = sum(layer.out_features for layer in layers)
    stacked = torch.nn.Linear(first.in_features, rows, bias=first.bias is not None)
    stacked = stacked.to(device=first.weight.device, dtype=first.weight.dtype)
    stacked.weight.copy_(torch.cat([layer.weight for layer in layers]))
    if first.bias is not None:
        stacked.bias.copy_(torch.cat([layer.bias for layer in layers]))
    return stacked
