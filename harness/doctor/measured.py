"""The strength to pass for a loader whose law is measured here and now."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError
from harness.files import read_lora


def measured_prescription(loader: str, path: Path, *, lora_alpha: float | None = None) -> float | None:
    """Measure the law of `loader` on the file's format and return the strength that reproduces its training.

    None when no single strength does, when no law explains the loader, or when the file carries no alpha and
    `lora_alpha` is not given either.

    Raises:
        UserError: `loader` names no loader, or it raised while being measured.
    """
    from harness.checks.law import measure_law
    from harness.loaders.registry import resolve

    adapter = read_lora(path, strict=False)
    formats = resolve(loader).formats
    measured = measure_law(loader, format=adapter.format if adapter.format in formats else None)
    if measured.raised:
        raise UserError(f"{loader}: cannot be measured: {measured.raised[0]}")
    modules = adapter.modules.values()
    alphas = [lora_alpha if module.alpha is None else module.alpha for module in modules]
    if measured.diagnosis.law is None or None in alphas:
        return None
    pairs = [(alpha, module.rank) for alpha, module in zip(alphas, modules, strict=True) if alpha is not None]
    return measured.diagnosis.law.prescription(pairs)
