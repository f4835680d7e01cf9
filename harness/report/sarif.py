"""SARIF 2.1.0 for file audits: each hazard of a LoRA file becomes a code-scanning result."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from harness.report.records import Run
from harness.text import plain
from harness.verdict.codes import CODES
from harness.verdict.file_record import FileRecord, Hazard

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(run: Run) -> dict[str, Any]:
    """Return the file records of a run as a SARIF log."""
    records = run.of(FileRecord)
    kinds = {hazard.code: hazard for record in records for hazard in record.hazards}
    codes = sorted(kinds)
    driver = {"name": "lora-harness", "rules": [_rule(kinds[code]) for code in codes]}
    if release := _release():
        driver["version"] = release
    results = [_result(record, hazard, codes) for record in records for hazard in record.hazards]
    whole = run.footer is not None and run.cut is None
    invocation = {"executionSuccessful": whole, "commandLine": plain(run.header.command)}
    body = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [body]}


def write_sarif(run: Run, path: Path | str) -> Path:
    """Write the SARIF log of a run and return its path."""
    path = Path(path)
    path.write_text(json.dumps(sarif(run), indent=1) + "\n", encoding="utf-8")
    return path


def level(hazard: Hazard) -> str:
    """Return `error` for a file that cannot be used as it is, `warning` for one that readers disagree about."""
    return "warning" if hazard.severity == "warning" else "error"


def _rule(hazard: Hazard) -> dict[str, Any]:
    code, known = hazard.code, CODES.get(hazard.code)
    return {
        "id": code,
        "defaultConfiguration": {"level": level(hazard)},
        "shortDescription": {"text": known.title if known else code},
        "help": {"text": f"{known.fix} (lora-harness explain {code})" if known else f"lora-harness explain {code}"},
    }


def _result(record: FileRecord, hazard: Hazard, codes: list[str]) -> dict[str, Any]:
    location = {"physicalLocation": {"artifactLocation": {"uri": _uri(record.path)}}}
    return {
        "ruleId": hazard.code,
        "ruleIndex": codes.index(hazard.code),
        "level": level(hazard),
        "message": {"text": plain(hazard.what or hazard.code, 1000)},
        "locations": [location],
    }


def _uri(path: str) -> str:
    return quote(PurePath(path).as_posix())


def _release() -> str | None:
    try:
        return version("lora-harness")
    except PackageNotFoundError:
        return None
