"""One number for the whole file: mlx-lm's scale in its configuration, llama.cpp's alpha in the GGUF header."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from harness.files.adapter import LoraModule, LoraWeights, Problem
from harness.files.format import CONFIG_NAME, Source
from harness.files.gguf_file import ALPHA_KEY
from harness.files.text import printable

Modules = dict[tuple[str, str], LoraModule]
Found = tuple[Modules, str, Mapping[str, Any]]  # modules with alpha, where it was, the configuration
_MLX = "lora_parameters"
_LARGEST = 1e300  # a JSON integer may be longer than any float


def from_scale(source: Source, modules: Modules, problems: list[Problem]) -> Found:
    """Fill in alpha = scale * rank, so that alpha / rank is the factor that mlx-lm multiplies with."""
    if source.config is None:
        return modules, "none", {}
    raw = source.config.get(_MLX)
    parameters = raw if isinstance(raw, dict) else {}
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        what = f"is {printable(repr(scale), 60)}, a number is needed: mlx-lm has no default when it loads"
        problems.append(Problem("LH705", f"{CONFIG_NAME}: {_MLX}.scale", what, fatal=True))
        return modules, "none", source.config
    for module in modules.values():
        if module.rank not in (0, rank):
            what = f"the configuration says rank {printable(repr(rank), 40)}, the tensors have rank {module.rank}"
            problems.append(Problem("LH706", printable(module.name), what, fatal=True))
    return {at: _scaled(module, float(min(scale, _LARGEST))) for at, module in modules.items()}, "config", source.config


def _scaled(module: LoraModule, scale: float) -> LoraModule:
    return module.changed(alpha=scale * module.rank) if module.rank else module


def from_kv(source: Source, modules: Modules, problems: list[Problem]) -> Found:
    """Fill in the alpha of a GGUF header; 0 is llama.cpp's word for none."""
    text = source.file.metadata.get(ALPHA_KEY, "0")
    try:
        alpha = float(text)
    except ValueError:
        problems.append(Problem("LH705", ALPHA_KEY, f"is {printable(text, 60)}, a number is needed", fatal=True))
        return modules, "none", {}
    if alpha == 0:
        return modules, "none", {}
    return {at: module.changed(alpha=alpha) if module.rank else module for at, module in modules.items()}, "header", {}


def one_alpha(format: str, modules: Mapping[str, LoraWeights]) -> float | None:
    """Return the alpha that all of `modules` share, for a format that stores one.

    Raises:
        ValueError: they differ.
    """
    alpha: float | None = _one(format, "alpha", (weights.alpha for weights in modules.values()))
    return alpha


def mlx_config(modules: Mapping[str, LoraWeights], *, rslora: bool = False) -> dict[str, Any]:
    """Return mlx-lm's adapter_config.json; with `num_layers` 0 only the modules named in `keys` are adapted.

    Raises:
        ValueError: ranks or scales differ, or a module has no alpha.
    """
    if missing := [name for name, weights in modules.items() if weights.alpha is None]:
        raise ValueError(f"modules[{missing[0]!r}].alpha=None: a mlx configuration always has a scale")
    rank = _one("mlx", "rank", (weights.rank for weights in modules.values()))
    root = math.sqrt(rank) if rslora else rank
    scale = _one("mlx", "alpha", (weights.alpha for weights in modules.values())) / root
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(modules)}
    return {"fine_tune_type": "lora", "num_layers": 0, _MLX: parameters}


def _one(format: str, what: str, values: Iterable[Any]) -> Any:
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise ValueError(f"{what} is {found[0]} and {found[1]}: a {format} file has one {what} for all modules")
    return found[0]
