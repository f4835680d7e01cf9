"""A run on a pull request: annotations of GitHub Actions, and the step summary and wiki page as Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    matrix_lines,
    not_measured,
    row_name,
    short_title,
)
from harness.text import plain

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
    formats = matrix_columns(grid)
    head = ["loader", "bench", *formats]
    lines = [_row([escape(name) for name in head]), _row(["---"] * len(head))]
    for loader, bench, variant in matrix_lines(grid):
        row = [grid.get((loader, fmt, bench, variant)) for fmt in formats]
        lines.append(_row([escape(loader), escape(row_name(bench, variant, row)), *map(_cell, row)]))
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
