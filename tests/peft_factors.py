"""PEFT's own merge of factors in memory, for arbitrary per-module rank and alpha: no file is written for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Factors = Mapping[str, tuple[Tensor, Tensor, float]]


def peft_merged_weights(
    model: torch.nn.Module, factors: Factors, *, strength: float = 1.0, rslora: bool = False
) -> dict[str, Tensor]:
    """Merge `factors` into `model` with PEFT and return the merged weight `[out, in]` of each module.

    `factors` maps a module path to (A: [rank, in], B: [out, rank], alpha). The model is consumed: its layers are
    wrapped and merged in place. Strength is applied through PEFT's own `set_scale` before merging.
    """
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {f"^{re.escape(name)}": a.shape[0] for name, (a, _, _) in factors.items()}
    alphas = {f"^{re.escape(name)}": alpha for name, (_, _, alpha) in factors.items()}
    targets = "|".join(re.escape(name) for name in factors)
    config = LoraConfig(
        target_modules=f"({targets})",
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=rslora,
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, model)
    return {name: _merge(model.get_submodule(name), a, b, strength) for name, (a, b, _) in factors.items()}


def _merge(layer: Any, a: Tensor, b: Tensor, strength: float) -> Tensor:
    import torch

    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    layer.set_scale("default", strength)
    layer.merge(safe_merge=True)
    weight: Tensor = layer.get_base_layer().weight
    return weight.detach()
