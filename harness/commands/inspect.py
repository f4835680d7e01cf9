"""`lora-harness inspect`: what is in a LoRA file, from its header alone."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.commands import options as shared

if TYPE_CHECKING:
    from harness.verdict.file_record import FileRecord


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Return a number that was given as an option, unless it is NaN or infinite.

    Raises:
        BadParameter: it is.
    """
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number", ctx, param)
    return value


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness inspect my_lora.safetensors\n"
    "  lora-harness inspect first.safetensors second.safetensors --html page.html\n"
    "  lora-harness inspect my_peft_folder --base model.safetensors --loader diffsynth-2.0.4"
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="LORA...")
@click.option(
    "--base", type=click.Path(path_type=Path), help="Base checkpoint: adds the strength relative to its weights."
)
@click.option("--energy", is_flag=True, help="Norm, spectral norm and effective rank of each module's update.")
@click.option("--loader", "loaders", multiple=True, metavar="LOADER", help="Measure this loader and prescribe for it.")
@click.option(
    "--lora-alpha", type=float, callback=finite, help="The alpha of the training, for a file that carries none."
)
@click.option("--strict", is_flag=True, help="Exit 1 for every hazard, not only for broken files.")
@click.option(
    "--sarif", "sarif_file", type=click.Path(dir_okay=False, path_type=Path), help="Write SARIF 2.1.0 here too."
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one page about all files here too, with the energies by module and block.",
)
@shared.json_option
def command(
    files: tuple[Path, ...],
    base: Path | None,
    energy: bool,
    loaders: tuple[str, ...],
    lora_alpha: float | None,
    strict: bool,
    sarif_file: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Say what each LORA file holds: format, rank, alpha, scale under each convention, hazards, strength to pass."""
    from harness.doctor.inspect.describe import inspect_file
    from harness.report.terminal import print_file

    if html:
        from harness.report.lora_page import checked_target

        checked_target(html)
    worst, records = 0, []
    for path in files:
        record = inspect_file(path, energy=energy or html is not None, base=base, lora_alpha=lora_alpha)
        if loaders:
            record = _with_loaders(record, path, loaders, lora_alpha)
        worst = max(worst, _exit_code(record, strict))
        records.append(record)
        if as_json:
            click.echo(record.model_dump_json())
        else:
            print_file(record)
    if sarif_file:
        _write_sarif(records, sarif_file, worst)
    if html:
        _write_page(records, html, quiet=as_json)
    sys.exit(worst)


def _write_page(records: Sequence[FileRecord], path: Path, *, quiet: bool) -> None:
    from harness.report.lora_page import write_lora_page

    page = write_lora_page(records, path, command=shlex.join(["lora-harness", *sys.argv[1:]]))
    if not quiet:
        click.echo(f"page: {page}")


def _write_sarif(records: Iterable[FileRecord], path: Path, exit_code: int) -> None:
    from harness.report.ci import write_sarif
    from harness.report.environment import new_header
    from harness.report.models import Footer
    from harness.report.records import Run

    write_sarif(Run(new_header(), tuple(records), Footer(counts={}, seconds=0.0, exit_code=exit_code)), path)


def _exit_code(record: FileRecord, strict: bool) -> int:
    exits = {None: 0, "warning": int(strict), "error": 1, "fatal": 2}
    return exits[record.severity]


def _with_loaders(record: FileRecord, path: Path, loaders: Iterable[str], lora_alpha: float | None) -> FileRecord:
    from harness.doctor.loader_law import measured_prescription

    if record.format is None:
        return record
    found = {name: measured_prescription(name, path, lora_alpha=lora_alpha) for name in loaders}
    return record.model_copy(update={"prescription": found})
