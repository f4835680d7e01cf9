"""The end of a run: history, gates, the HTML report, annotations for CI, and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from harness.checks.verdict import Verdict


def finish(
    out: Path, verdicts: Sequence[Verdict], *, baseline: Path | None, rules: Sequence[str], as_json: bool
) -> int:
    """Write the report of OUT/run.jsonl, add it to OUT/history.jsonl and return the exit code."""
    from harness.report.annotations import github_annotations
    from harness.report.gates import compare
    from harness.report.history import append_history, read_history
    from harness.report.markdown import write_step_summary
    from harness.report.records import read_run

    run = read_run(out / "run.jsonl")
    append_history(out / "history.jsonl", run)
    gate = compare(read_run(baseline), run, rules) if baseline else []
    write_step_summary(run, gate)
    show(out, as_json=as_json, history=read_history(out / "history.jsonl"))
    if not as_json:
        for line in [*github_annotations(run, gate), *(f"gate: {result.text()}" for result in gate)]:
            click.echo(line)
    if baseline:
        return 1 if gate else 0
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def show(out: Path, *, as_json: bool, history: Sequence[Any] = ()) -> None:
    """Write OUT/index.html from OUT/run.jsonl and print the run."""
    from harness.report.html import write_report
    from harness.report.records import read_run
    from harness.report.terminal import print_run

    run = read_run(out / "run.jsonl")
    page = write_report([run], out, history=history)
    if not as_json:
        print_run(run)
        click.echo(f"report: {page}")
