"""A broken configuration has the title of what is broken: alpha, the rank, or a pattern."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor import inspect_file
from harness.verdict.codes import CODES

NAME = "base_model.model.blocks.0.to_q"


def codes(folder: Path, **fields: Any) -> set[str]:
    """Return the codes of a PEFT folder of one module whose configuration has these fields."""
    tensors = {f"{NAME}.lora_A.weight": torch.ones(4, 6), f"{NAME}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return set(inspect_file(folder).codes)


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"lora_alpha": "16"}, "LH705", "alpha"),
        ({"lora_alpha": None}, "LH705", "alpha"),
        ({"lora_alpha": 10**400}, "LH705", "alpha"),
        ({"lora_alpha": float("nan")}, "LH705", "alpha"),
        ({"alpha_pattern": {"to_q": "16"}}, "LH705", "alpha"),
        ({"r": "4"}, "LH726", "rank"),
        ({"r": None}, "LH726", "rank"),
        ({"r": 4.5}, "LH726", "rank"),
        ({"rank_pattern": {"to_q": [4]}}, "LH726", "rank"),
        ({"rank_pattern": ["to_q"]}, "LH727", "patterns"),
        ({"rank_pattern": {"to_(q": 4}}, "LH727", "patterns"),
        ({"alpha_pattern": {"[": 4}}, "LH727", "patterns"),
        ({"target_modules": ".*(to_q"}, "LH727", "patterns"),
        ({"layers_pattern": ["("]}, "LH727", "patterns"),
    ],
)
def test_a_broken_configuration_has_the_title_of_what_is_broken(
    fields: dict[str, Any], code: str, word: str, tmp_path: Path
) -> None:
    assert codes(tmp_path, **fields) == {code}
    assert word in CODES[code].title


def test_a_whole_one_has_none(tmp_path: Path) -> None:
    assert codes(tmp_path, rank_pattern={"to_q": 4}, alpha_pattern={"to_.": 16}) == set()
