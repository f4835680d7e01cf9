"""`lora-harness history`: what changed between recorded runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="\b\nExample:\n  lora-harness history reports/out/history.jsonl")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[HISTORY.jsonl...]")
@click.option("--last", type=click.IntRange(1), default=30, show_default=True, help="How many runs to show.")
def command(files: tuple[Path, ...], last: int) -> None:
    """Show the last runs of one or several machines, and every loader whose law or outcome flipped."""
    from harness.report.history import history_text, read_history

    click.echo(history_text(read_history(*(files or (Path("reports/out/history.jsonl"),))), last))
