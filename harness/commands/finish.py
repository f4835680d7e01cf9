"""The end of a run: history, gates, the HTML report, annotations for CI, and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def finish(out: Path, *, baseline: Path | None, rules: Sequence[str], as_json: bool) -> int:
    """Write the report of OUT/run.jsonl, add it to OUT/history.jsonl and return the exit code.

    With a `baseline` only what got worse counts; without one, every violation and every planned part that was not
    measured.
    """
    from harness.report.annotations import github_annotations
    from harness.report.gates import compare
    from harness.report.history import append_history, read_history
    from harness.report.markdown import write_step_summary
    from harness.report.records import read_run

    run = read_run(out / "run.jsonl")
    append_history(out / "history.jsonl", run)
    gate = compare(read_run(baseline), run, rules) if baseline else None
    write_step_summary(run, gate or ())
    show(out, as_json=as_json, history=read_history(out / "history.jsonl"), gate=gate)
    if not as_json:
        for line in [*github_annotations(run, gate or ()), *(f"gate: {result.text()}" for result in gate or ())]:
            click.echo(line)
    if gate is not None:
        return 1 if gate else 0
    return 0 if run.status == "passed" else 1


def show(out: Path, *, as_json: bool, history: Sequence[Any] = (), gate: Sequence[Any] | None = None) -> None:
    """Write OUT/index.html from OUT/run.jsonl and print the run."""
    from harness.report.html import write_report
    from harness.report.records import read_run
    from harness.report.terminal import print_run

    run = read_run(out / "run.jsonl")
    page = write_report([run], out, history=history, gate=gate)
    if not as_json:
        print_run(run)
        click.echo(f"report: {page}")
