"""The adapter configuration (PEFT's LoraConfig as JSON): which rank and alpha it gives to a module."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.files.patterns import Patterns

DEFAULT_RANK = DEFAULT_ALPHA = 8  # peft.LoraConfig


class ConfigError(ValueError):
    """A configuration value that cannot be used; `key` names it."""

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        super().__init__(problem)


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and alpha per module, with PEFT's defaults and pattern semantics."""

    rank: Any
    alpha: float
    rslora: bool
    ranks: Patterns
    alphas: Patterns
    raw: Mapping[str, Any]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """Read the fields that decide the scale.

        Raises:
            ConfigError: a field has the wrong type.
        """
        alpha_key = "lora_alpha" if "lora_alpha" in raw or raw.get("peft_type", "LORA") == "LORA" else "alpha"
        rank = raw.get("r", DEFAULT_RANK)
        if not _is_whole(rank):
            raise ConfigError("r", f"is {rank!r}, a whole number is needed")
        return cls(
            rank=rank,
            alpha=_number(alpha_key, raw.get(alpha_key, DEFAULT_ALPHA)),
            rslora=bool(raw.get("use_rslora", False)),
            ranks=_patterns("rank_pattern", raw),
            alphas=_patterns("alpha_pattern", raw),
            raw=raw,
        )

    def of(self, name: str) -> tuple[int, float]:
        """Return (rank, alpha) that PEFT uses for the module `name` (without `base_model.model.`).

        Raises:
            PatternError, ConfigError: a pattern or its value cannot be used.
        """
        rank = self.ranks.get(name, self.rank)
        if not _is_whole(rank):
            raise ConfigError("rank_pattern", f"is {rank!r} for {name}, a whole number is needed")
        return rank, _number("alpha_pattern", self.alphas.get(name, self.alpha))


def build(ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool) -> dict[str, Any]:
    """Return the configuration that gives every module its rank and alpha; the most common values are the defaults.

    Pattern keys are anchored and escaped, so that `to_q` never reaches `attn.to_q` nor `0.x` `10.x`.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {anchored(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {anchored(name): _plain(value) for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_rslora": rslora,
    }


def anchored(name: str) -> str:
    """Return a pattern that matches `name` and no other module."""
    return "^" + re.escape(name)


def _plain(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(key, f"is {value!r}, a number is needed")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(key, "is too large for a number") from None


def _patterns(key: str, raw: Mapping[str, Any]) -> Patterns:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(key, f"is {value!r}, an object of module name to number is needed")
    return Patterns(value)
