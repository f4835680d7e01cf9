"""lora-harness: measure what a LoRA loader really does, name its scaling law, keep it right in CI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.benches.own import bench
    from harness.checks.known import KnownFailure, read_known_failures
    from harness.checks.law import MeasuredLaw, measure_law
    from harness.checks.parametrize import parametrize_with_checks
    from harness.checks.run import check_loader
    from harness.errors import LoaderSpecError, LoraFileError, UserError
    from harness.example import Example, Target
    from harness.isolation.elsewhere import Elsewhere
    from harness.isolation.limits import Limits
    from harness.law.diagnosis import Diagnosis
    from harness.law.grammar import Word
    from harness.law.law import Law
    from harness.law.probe import Probe
    from harness.law.traits import Trait
    from harness.loaders.declaration import Declaration, loader
    from harness.loaders.protocol import Defaults, Load, Outputs, Subject
    from harness.verdict.verdict import Carried, LawRecord, Verdict

_NAMES = {
    "benches.own": ("bench",),
    "checks.known": ("KnownFailure", "read_known_failures"),
    "checks.law": ("MeasuredLaw", "measure_law"),
    "checks.parametrize": ("parametrize_with_checks",),
    "checks.run": ("check_loader",),
    "errors": ("LoaderSpecError", "LoraFileError", "UserError"),
    "example": ("Example", "Target"),
    "isolation.elsewhere": ("Elsewhere",),
    "isolation.limits": ("Limits",),
    "law.diagnosis": ("Diagnosis",),
    "law.grammar": ("Word",),
    "law.law": ("Law",),
    "law.probe": ("Probe",),
    "law.traits": ("Trait",),
    "loaders.declaration": ("Declaration", "loader"),
    "loaders.protocol": ("Defaults", "Load", "Outputs", "Subject"),
    "verdict.verdict": ("Carried", "LawRecord", "Verdict"),
}
_HOME = {name: f"harness.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "Carried", "Declaration", "Defaults", "Diagnosis", "Elsewhere", "Example", "KnownFailure", "Law", "LawRecord",
    "Limits", "Load", "LoaderSpecError", "LoraFileError", "MeasuredLaw", "Outputs", "Probe", "Subject", "Target",
    "Trait", "UserError", "Verdict", "Word", "bench", "check_loader", "loader", "measure_law",
    "parametrize_with_checks", "read_known_failures",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import harness` alone stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
