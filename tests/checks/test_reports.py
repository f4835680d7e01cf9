"""Reports of loaders that no broken loader of the fixtures is like: each is found, by its law."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import check_loader
from harness.checks.run import Limits
from tests.checks.sample_loaders import pairs


def served(targets: tuple[str, ...], model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """vllm#55193: LoRA is attached to the modules the server was started with; the rest is dropped, nothing is said."""
    for layer, module, product, _ in pairs(model, lora):
        if module.name.rpartition(".")[2] in targets:
            layer.weight += (strength * module.trained_scale * product).to(layer.weight.dtype)


def scaled_once_too_often(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """sd-webui-forge-classic#1428: the update is multiplied by a scale of the layer's quantisation."""
    for layer, module, product, _ in pairs(model, lora):
        factor = min(max(float(layer.weight.abs().max()) / 0.3, 0.1), 0.5)
        layer.weight += (strength * module.trained_scale * factor * product).to(layer.weight.dtype)


REPORTS: dict[str, tuple[Callable[..., None], str]] = {
    "no target is in the file": (functools.partial(served, ("qkv_proj",)), "LH101"),
    "half of the targets": (functools.partial(served, ("to_q", "to_v")), "LH102"),
    "quantisation's scale": (scaled_once_too_often, "LH209"),
}


@pytest.mark.parametrize("report", REPORTS)
def test_a_reported_loader_is_found(report: str) -> None:
    load, code = REPORTS[report]
    verdicts = check_loader(
        load, formats=["peft"], benches=["qwen-image"], max_examples=10, limits=Limits(seconds=5, workers=1)
    )
    assert code in [verdict.code for verdict in verdicts if not verdict.ok], [verdict.text() for verdict in verdicts]
