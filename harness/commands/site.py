"""`lora-harness site`: a static site of what loaders do, from recorded runs."""

from __future__ import annotations

from pathlib import Path

import click

from harness.text import count


@click.command(epilog="\b\nExample:\n  lora-harness site reports/out/run.jsonl --out reports/out/site")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN.jsonl...")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the site.")
@click.option(
    "--with-diagnose", "python", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
    help="Add a page that diagnoses a file in the browser; FOLDER has pyodide and its wheels (docs/nightly.md).",
)  # fmt: skip
def command(runs: tuple[Path, ...], out: Path, python: Path | None) -> None:
    """Write a site into OUT: a page per loader, finding, format and code, badges, a search; any server can serve it.

    Set LORA_HARNESS_SITE to its address, and reports and the terminal link to its pages.
    """
    from harness.report.records import read_run
    from harness.report.site.in_browser import Parts
    from harness.report.site.pages import write_site

    parts = Parts.within(python) if python else None
    pages = write_site([read_run(path) for path in runs], out, python=parts)
    click.echo(f"{count(pages, 'page')}: {out / 'index.html'}")
