"""The doctor: what is in a LoRA file, what readers will make of it, which strength to pass. Header only, no torch."""

from __future__ import annotations

from harness.doctor.inspect import describe, inspect_file
from harness.doctor.prescribe import ScaleLaw, conventions, known_laws, prescribe, prescriptions
from harness.doctor.record import Advice, FileRecord, Hazard, ModuleEnergy

__all__ = [
    "Advice",
    "FileRecord",
    "Hazard",
    "ModuleEnergy",
    "ScaleLaw",
    "conventions",
    "describe",
    "inspect_file",
    "known_laws",
    "prescribe",
    "prescriptions",
]
