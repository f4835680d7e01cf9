"""`lora-harness report`: HTML or Markdown from recorded runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(epilog="\b\nExample:\n  lora-harness report reports/out/run.jsonl --out reports/out")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN.jsonl...")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("reports/out"), show_default=True)
@click.option("--markdown", is_flag=True, help="Print the matrix as Markdown instead of writing HTML.")
@click.option("--history", type=click.Path(dir_okay=False, path_type=Path), help="history.jsonl to embed as a trend.")
def command(runs: tuple[Path, ...], out: Path, markdown: bool, history: Path | None) -> None:
    """Write OUT/index.html from one or more recorded runs: one file that opens from disk, without a network.

    Exit 1 when a run was cut short: nothing in it counts as a pass.
    """
    from harness.report.ci import matrix_markdown
    from harness.report.history import read_history
    from harness.report.html import write_report
    from harness.report.records import merge_runs, read_run
    from harness.text import on_one_line

    read = [read_run(path) for path in runs]
    whole = merge_runs(read)
    if markdown:
        click.echo(matrix_markdown(whole))
    else:
        click.echo(write_report(read, out, history=read_history(history) if history else None))
    if whole.status == "cut":
        click.echo(f"cut short: {on_one_line(whole.cut or 'the run has no footer')}", err=True)
        sys.exit(1)
