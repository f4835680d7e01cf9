"""lora-harness: measure what a LoRA loader really does, name its scaling law, keep it right in CI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.checks.known import KnownFailure, read_known_failures
    from harness.checks.law import measure_law
    from harness.checks.parametrize import parametrize_with_checks
    from harness.checks.run import check_loader
    from harness.example import Example, Target
    from harness.law.law import Law
    from harness.loaders.protocol import loader
    from harness.verdict.verdict import Verdict

_HOME = {
    "Example": "harness.example",
    "KnownFailure": "harness.checks.known",
    "Law": "harness.law.law",
    "Target": "harness.example",
    "Verdict": "harness.verdict.verdict",
    "check_loader": "harness.checks.run",
    "loader": "harness.loaders.protocol",
    "measure_law": "harness.checks.law",
    "parametrize_with_checks": "harness.checks.parametrize",
    "read_known_failures": "harness.checks.known",
}

__all__ = [
    "Example",
    "KnownFailure",
    "Law",
    "Target",
    "Verdict",
    "check_loader",
    "loader",
    "measure_law",
    "parametrize_with_checks",
    "read_known_failures",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import harness` alone stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
