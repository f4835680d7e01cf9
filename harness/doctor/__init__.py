"""The doctor: what is in a LoRA file, what a merge really did, a whole library in rows, a file that readers agree on.

`inspect_file` needs neither torch nor numpy; the others are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.doctor.answers import prescriptions
from harness.doctor.inspect.describe import describe, inspect_file
from harness.doctor.inspect.weights import Weighed
from harness.law.known import Scaled, ScaleLaw, conventions, known_laws, prescribe
from harness.verdict.file_record import Advice, BaseFit, FileRecord, Hazard, ModuleEnergy

if TYPE_CHECKING:
    from harness.doctor.audit.audit import AuditOptions, audit_files
    from harness.doctor.audit.output import read_rows, write_rows
    from harness.doctor.repair.repair import RepairOptions, RepairReport, repair_file
    from harness.doctor.verify.measurement import MergeMeasurement
    from harness.doctor.verify.modules import Module, NotMeasured
    from harness.doctor.verify.rows import Damage
    from harness.doctor.verify.untouched import Untouched
    from harness.doctor.verify.verify import MergeReport, VerifyOptions, verify_merge

AuditRow = FileRecord  # with what an audit adds filled in
_LATER = {
    "AuditOptions": "audit.audit",
    "Damage": "verify.rows",
    "MergeMeasurement": "verify.measurement",
    "MergeReport": "verify.verify",
    "Module": "verify.modules",
    "NotMeasured": "verify.modules",
    "RepairOptions": "repair.repair",
    "RepairReport": "repair.repair",
    "Untouched": "verify.untouched",
    "VerifyOptions": "verify.verify",
    "audit_files": "audit.audit",
    "read_rows": "audit.output",
    "repair_file": "repair.repair",
    "verify_merge": "verify.verify",
    "write_rows": "audit.output",
}

__all__ = [
    "Advice",
    "AuditOptions",
    "AuditRow",
    "BaseFit",
    "Damage",
    "FileRecord",
    "Hazard",
    "MergeMeasurement",
    "MergeReport",
    "Module",
    "ModuleEnergy",
    "NotMeasured",
    "RepairOptions",
    "RepairReport",
    "ScaleLaw",
    "Scaled",
    "Untouched",
    "VerifyOptions",
    "Weighed",
    "audit_files",
    "conventions",
    "describe",
    "inspect_file",
    "known_laws",
    "prescribe",
    "prescriptions",
    "read_rows",
    "repair_file",
    "verify_merge",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"harness.doctor.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
