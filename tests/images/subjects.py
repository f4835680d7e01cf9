"""Loaders that are wrong by a known rule, and a right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from harness.files import match_modules, read_lora
from harness.loaders.declaration import Declaration
from harness.loaders.protocol import Subject

Rule = Callable[[int, float, float], float]


def subject(name: str, rule: Rule, *, benches: frozenset[str] | None = None) -> Subject:
    """A loader that adds rule(rank, trained scale, strength) * B @ A to every weight; `alpha` is scale * rank."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        adapter = read_lora(lora)
        names, _ = match_modules(adapter, [path for path, _ in model.named_modules()])
        for name, path in names.items():
            module, (a, b) = adapter.modules[name], adapter.tensors(name)
            weight: torch.Tensor = model.get_submodule(path).weight
            factor = rule(module.rank, module.trained_scale, strength)
            weight.data += (factor * (b.double() @ a.double())).to(weight.dtype)

    return Subject(name, load, "1.0", Declaration(benches=benches))


def times(factor: float) -> Subject:
    """A loader that is `factor` times too strong."""
    return subject(f"times-{factor:g}", lambda rank, scale, strength: factor * scale * strength)


def raw_alpha() -> Subject:
    """A loader that multiplies by alpha and never divides by the rank."""
    return subject("raw-alpha", lambda rank, scale, strength: scale * rank * strength)
