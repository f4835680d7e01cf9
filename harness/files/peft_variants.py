"""How PEFT's folders say DoRA, biases, embeddings, LoHa and LoKr: the keys, and the configuration beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.files.adapter import LoraParts, LoraWeights
from harness.files.config import build

PEFT_TAILS: Mapping[str, str] = {
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "bias": "lora_B.bias",
}
"""Role -> how its key ends where PEFT does not write the role itself."""

_COMMON = {"task_type": None, "base_model_name_or_path": None, "inference_mode": True, "modules_to_save": None}
_LORA = {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
_OTHERS = {"hada_": "LOHA", "lokr_": "LOKR"}


def peft_config(modules: Mapping[str, LoraWeights | LoraParts]) -> dict[str, Any]:
    """Return the adapter configuration of modules that all have the same variant.

    Raises:
        ValueError: a module without alpha, or PEFT has no configuration for the parts.
    """
    ranks = {name: rank_of(weights) for name, weights in modules.items()}
    config = build(ranks, {name: float(weights.alpha or 0.0) for name, weights in modules.items()}, rslora=False)
    roles = {role for weights in modules.values() if isinstance(weights, LoraParts) for role in weights.parts}
    other = next((kind for start, kind in _OTHERS.items() if any(role.startswith(start) for role in roles)), None)
    if other is None:
        flags = {"use_dora": "magnitude" in roles, "lora_bias": "bias" in roles}
        return {**_COMMON, **_LORA, **config, **flags, "peft_type": "LORA"}
    alphas = {"alpha": config.pop("lora_alpha"), "module_dropout": 0.0, "rank_dropout": 0.0}
    del config["use_rslora"]
    return {**_COMMON, **config, **alphas, "peft_type": other}


def rank_of(weights: LoraWeights | LoraParts) -> int:
    """Return the rank of one module from the shapes of its parts.

    Raises:
        ValueError: none of the parts has a rank.
    """
    if isinstance(weights, LoraWeights):
        return weights.rank
    for role, axis in (("A", 0), ("embedding_A", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if role in weights.parts:
            return int(weights.parts[role].shape[axis])
    raise ValueError(f"PEFT has no configuration for parts {', '.join(weights.parts)}")
