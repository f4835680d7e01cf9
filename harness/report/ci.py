"""A run on a pull request: annotations of GitHub Actions, step summary and wiki page as Markdown, hazards as SARIF."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from harness.outputs import replace_file, saying
from harness.report.environment import installed_versions
from harness.report.gates import GateResult
from harness.report.records import Run
from harness.report.summary import (
    OUTCOMES,
    SYMBOLS,
    WORDS,
    MatrixCell,
    causes,
    cells,
    headline,
    loader_summaries,
    matrix_columns,
    matrix_rows,
    not_measured,
    short_title,
)
from harness.text import plain
from harness.verdict.codes import CODES
from harness.verdict.file_record import FileRecord, Hazard

_MOST = 10  # Actions shows ten errors and ten warnings per step


def github_annotations(run: Run, gate: Sequence[GateResult] = (), *, file: str | None = None) -> list[str]:
    """Return the `::error` and `::warning` lines of a run; none outside GitHub Actions.

    `file` ties the annotations to a file of the repository (the loader under test).
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return []
    return [*_errors(run, gate, file)][:_MOST] + [*_warnings(run, file)][:_MOST]


def _errors(run: Run, gate: Sequence[GateResult], file: str | None) -> Iterator[str]:
    for cause in causes(run.verdicts):
        text = cause.worst.text() + (f"\n  {cause.also()}" if cause.also() else "")
        yield workflow_command("error", text, title=f"{cause.worst.loader}: {short_title(cause.worst)}", file=file)
    for result in gate:
        yield workflow_command("error", result.text(), title=result.rule, file=file)


def _warnings(run: Run, file: str | None) -> Iterator[str]:
    for part in not_measured(run):
        yield workflow_command("warning", part.reason, title=f"not measured: {part.name}", file=file)


def workflow_command(name: str, message: str, **properties: str | None) -> str:
    """Return `::name key=value::message` with the escapes that the runner undoes."""
    given = ",".join(f"{key}={_property(value)}" for key, value in properties.items() if value)
    return f"::{name}{' ' if given else ''}{given}::{_data(message)}"


def _data(text: str) -> str:
    return plain(text).replace("%", "%25").replace("\n", "%0A")  # plain shows a carriage return as text


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


_MOST_CAUSES = 10
_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&@])")


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(plain(text).split()))


def code(text: str) -> str:
    """Return text as a code span, whatever backticks and pipes it holds."""
    text = " ".join(plain(text).split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def matrix_markdown(run: Run) -> str:
    """Return the matrix loader x format as a Markdown table, the measured law in each cell that is not right."""
    grid = cells(run)
    head = ["loader", "bench", *matrix_columns(grid)]
    lines = [_row([escape(name) for name in head]), _row(["---"] * len(head))]
    lines += [_row([escape(row.loader), escape(row.name), *map(_cell, row.cells)]) for row in matrix_rows(grid)]
    return "\n".join(lines) + "\n"


def step_summary(run: Run, gate: Sequence[GateResult] = ()) -> str:
    """Return the run as Markdown: verdict, findings, counts, matrix, failures folded, what was not measured."""
    counts = ", ".join(f"{run.counts[o]} {SYMBOLS[o]} {WORDS[o]}" for o in OUTCOMES if run.counts.get(o))
    found = "\n".join(f"- {escape(summary.text())}" for summary in loader_summaries(run))
    parts = [f"## {escape(headline(run))}", found, counts]
    if any(verdict.format for verdict in run.verdicts):
        parts.append(matrix_markdown(run))
    if gate:
        parts.append("### Compared with the baseline\n\n" + "\n".join(f"- {escape(result.text())}" for result in gate))
    parts += [_cause(cause.worst.text(), cause.also()) for cause in causes(run.verdicts)[:_MOST_CAUSES]]
    missing = [f"- {escape(part.name)}: {escape(part.reason)}" for part in not_measured(run)]
    if missing:
        parts.append("### Not measured\n\n" + "\n".join(missing))
    parts.append(f"Repeat with {code(run.header.command)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def write_step_summary(run: Run, gate: Sequence[GateResult] = ()) -> bool:
    """Append the summary to the file that GitHub Actions names; return False outside Actions."""
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if not target:
        return False
    with Path(target).open("a", encoding="utf-8") as file:
        file.write(step_summary(run, gate))
    return True


def _cause(text: str, also: str) -> str:
    text = plain(text) + (f"\n  {also}" if also else "")
    fence = "`" * max(3, max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _cell(cell: MatrixCell | None) -> str:
    if cell is None:
        return SYMBOLS["none"]
    law = f" {code(cell.formula)}" if cell.formula and cell.outcome != "passed" else ""
    return f"{SYMBOLS[cell.outcome]} {WORDS[cell.outcome]}{law}"


def sarif(run: Run) -> dict[str, Any]:
    """Return the file records of a run as a SARIF log."""
    records = run.of(FileRecord)
    kinds = {hazard.code: hazard for record in records for hazard in record.hazards}
    codes = sorted(kinds)
    driver: dict[str, Any] = {"name": "lora-harness", "rules": [_rule(kinds[name]) for name in codes]}
    if release := installed_versions(["lora-harness"]):
        driver["version"] = release["lora-harness"]
    results = [_hazard_result(record, hazard, codes) for record in records for hazard in record.hazards]
    whole = run.footer is not None and run.cut is None
    invocation = {"executionSuccessful": whole, "commandLine": plain(run.header.command)}
    body = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [body]}


def write_sarif(run: Run, path: Path | str) -> Path:
    """Write the SARIF log of a run and return its path.

    Raises:
        UserError: it cannot be written; a log that was there stays as it was.
    """
    path = Path(path)
    with saying(path):
        replace_file(path, (json.dumps(sarif(run), indent=1) + "\n").encode())
    return path


def level(hazard: Hazard) -> str:
    """Return `error` for a file that cannot be used as it is, `warning` for one that readers disagree about."""
    return "warning" if hazard.severity == "warning" else "error"


def _rule(hazard: Hazard) -> dict[str, Any]:
    known, ask = CODES.get(hazard.code), f"lora-harness explain {hazard.code}"
    return {
        "id": hazard.code,
        "defaultConfiguration": {"level": level(hazard)},
        "shortDescription": {"text": known.title if known else plain(hazard.code, 100)},
        "help": {"text": f"{known.fix} ({ask})" if known else ask},
    }


def _hazard_result(record: FileRecord, hazard: Hazard, codes: list[str]) -> dict[str, Any]:
    where = quote(PurePath(record.path).as_posix().encode(errors="surrogateescape"))
    location = {"physicalLocation": {"artifactLocation": {"uri": where}}}
    return {
        "ruleId": hazard.code,
        "ruleIndex": codes.index(hazard.code),
        "level": level(hazard),
        "message": {"text": plain(hazard.what or hazard.code, 1000)},
        "locations": [location],
    }
