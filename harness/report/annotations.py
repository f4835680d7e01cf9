"""Workflow commands of GitHub Actions: one annotation per cause, so that a violation shows on the pull request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from harness.report.gates import GateResult
from harness.report.plain import plain
from harness.report.records import Run
from harness.report.summary import causes, not_measured, short_title

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
