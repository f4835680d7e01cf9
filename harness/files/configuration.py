"""The configuration that lies beside written weights, or in their header: PEFT's, mlx-lm's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from harness.files.alpha import MLX
from harness.files.config import build
from harness.files.format import Format
from harness.law.scale import trained_scale

_PEFT_COMMON = {"task_type": None, "base_model_name_or_path": None, "inference_mode": True, "modules_to_save": None}
_PEFT_LORA = {"peft_type": "LORA", "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
_PEFT_OTHERS = {"hada_": "LOHA", "lokr_": "LOKR"}


class Ranked(Protocol):
    """What the configuration says of a module: its rank and alpha, and which parts it has."""

    @property
    def rank(self) -> int:
        """The rank of the pair."""

    @property
    def alpha(self) -> float | None:
        """Its alpha, None without one."""

    @property
    def parts(self) -> Mapping[str, Any]:
        """Its tensors by role."""


def configuration(row: Format, modules: Mapping[str, Ranked], *, rslora: bool = False) -> dict[str, Any]:
    """Return the configuration of one component: PEFT's, mlx-lm's, or the header's; empty where there is none.

    Raises:
        ValueError: the format has one rank or alpha for all modules, and these differ.
    """
    if row.alpha[0] == "scale":
        return _mlx_config(modules, rslora)
    alphas = {name: weights.alpha for name, weights in modules.items() if weights.alpha is not None}
    if row.alpha[0] not in ("config", "header") or not alphas:
        return {}
    ranks = {name: weights.rank for name, weights in modules.items()}
    neutral = {name: math.sqrt(rank) if rslora else float(rank) for name, rank in ranks.items()}
    config = build(ranks, {**neutral, **alphas}, rslora=rslora)
    roles = {role for weights in modules.values() for role in weights.parts}
    if stacked := stacked_experts(modules):
        rest = [name for name in config["target_modules"] if name not in stacked]
        config |= {"target_modules": rest, "target_parameters": stacked}
    return _peft_config(config, roles) if row.folder else config


def stacked_experts(modules: Mapping[str, Ranked]) -> list[str]:
    """Return the names of the parameters that hold all experts of a layer."""
    return [name for name, weights in modules.items() if getattr(weights, "experts", 0)]


def _peft_config(scales: dict[str, Any], roles: set[str]) -> dict[str, Any]:
    """Return adapter_config.json of modules with these parts, given the fields that decide the scale."""
    for start, kind in _PEFT_OTHERS.items():
        if any(role.startswith(start) for role in roles):
            if scales.pop("use_rslora"):
                raise ValueError(f"rslora=True is not written for {kind}, whose configuration has no such field")
            alpha = {"alpha": scales.pop("lora_alpha"), "module_dropout": 0.0, "rank_dropout": 0.0}
            return {**_PEFT_COMMON, **scales, **alpha, "peft_type": kind}
    bias = {"lora_bias": True} if "bias" in roles else {}
    return {**_PEFT_COMMON, **_PEFT_LORA, **scales, **bias, "use_dora": "magnitude" in roles}


def _mlx_config(modules: Mapping[str, Ranked], rslora: bool) -> dict[str, Any]:
    """Return mlx-lm's adapter_config.json; with `num_layers` 0 only the modules named in `keys` are adapted."""
    if missing := [name for name, weights in modules.items() if weights.alpha is None]:
        raise ValueError(f"modules[{missing[0]!r}].alpha=None: a mlx configuration always has a scale")
    rank, alpha = (one_of_all("mlx", what, modules) for what in ("rank", "alpha"))
    parameters = {"rank": rank, "scale": trained_scale(alpha, rank, rslora=rslora), "dropout": 0.0}
    return {"fine_tune_type": "lora", "num_layers": 0, MLX: {**parameters, "keys": sorted(modules)}}


def one_of_all(format: str, what: str, modules: Mapping[str, Ranked]) -> Any:
    """Return the rank or alpha that all of `modules` share, for a format that stores one."""
    found = list(dict.fromkeys(getattr(weights, what) for weights in modules.values()))
    if len(found) > 1:
        raise ValueError(f"{what} is {found[0]} and {found[1]}: a {format} file has one {what} for all modules")
    return found[0]
