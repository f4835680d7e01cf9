"""Trainer metadata of a file: bounded, and made safe to show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from harness.text import parse_json, printable

_SHOWN_VALUES = 24
_SHOWN_CHARACTERS = 200
_LONG = 200_000
_FIRST = (
    "ss_output_name", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "ss_learning_rate", "ss_num_epochs", "ss_epoch", "ss_steps",
    "modelspec.architecture", "modelspec.title", "modelspec.implementation", "software", "training_info", "name",
    "version",
)  # fmt: skip
_TRAINERS = (
    ("ai-toolkit", r"ai-?toolkit"), ("OneTrainer", r"onetrainer|^ot_"), ("SimpleTuner", r"simpletuner"),
    ("musubi-tuner", r"musubi"), ("DiffSynth-Studio", r"diffsynth"), ("LyCORIS", r"lycoris"),
    ("kohya sd-scripts", r"sd-scripts|^ss_"),
)  # fmt: skip
_ALPHA_KEYS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
_UNSAID = frozenset({"", "none", "null", "dynamic"})


def shown(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata worth showing, the best known keys first, every value cut and without control characters."""
    known = [key for key in _FIRST if key in metadata]
    others = sorted(key for key in metadata if key not in known and len(metadata[key]) <= _SHOWN_CHARACTERS)
    keys = (known + others)[:_SHOWN_VALUES]
    return {printable(key, 60): printable(metadata[key], _SHOWN_CHARACTERS) for key in keys}


def trainer(metadata: Mapping[str, str]) -> str | None:
    """Name the tool that wrote the metadata, as far as it can be told."""
    texts = [*metadata, *(value[:_SHOWN_CHARACTERS] for value in metadata.values())]
    return next((name for name, pattern in _TRAINERS if any(re.search(pattern, text, re.I) for text in texts)), None)


def declared_alphas(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return the finite alphas that the metadata names, by key; `conv_alpha` comes from the network arguments."""
    named = {key: metadata[key] for key in _ALPHA_KEYS if key in metadata}
    arguments = _object(metadata.get("ss_network_args", ""))
    if "conv_alpha" in arguments:
        named["ss_network_args conv_alpha"] = str(arguments["conv_alpha"])
    found = {key: _number(text) for key, text in named.items() if text.strip().lower() not in _UNSAID}
    return {key: value for key, value in found.items() if value is not None}


def _object(text: str) -> Mapping[str, object]:
    try:
        value = parse_json(text, limit=_LONG)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(text: str) -> float | None:
    if len(text) > 40:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
