"""`lora-harness audit`: thousands of LoRA files, one row each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared
from harness.commands.screen import print_json, progress
from harness.text import count, printable

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from harness.doctor.audit.rows import RowStore
    from harness.report.library import Tally
    from harness.verdict.file_record import FileRecord

_FOLDERS = 5


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness audit ~/loras --out rows.jsonl --out rows.html\n"
    "  lora-harness audit '~/loras/**/*.safetensors' --out rows.jsonl --resume"
)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--out", "outs", multiple=True, type=shared.FILE, metavar="FILE",
    help="Write the rows: .jsonl, .json, .csv, .parquet or .html; repeat for more.",
)  # fmt: skip
@click.option(
    "--resume", is_flag=True,
    help="Take over the rows of --out, and of an audit that was killed, whose file has not changed; keep the others.",
)  # fmt: skip
@click.option("--energy", is_flag=True, help="Norm and effective rank of each module's update (reads the weights).")
@click.option("--no-duplicates", is_flag=True, help="Do not look for files with the same weights.")
@click.option("--seconds", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Limit for one file.")
@click.option("--memory", type=click.IntRange(64), default=1024, show_default=True, help="Limit for one file, MiB.")
@click.option("--dask", metavar="ADDRESS", help="Run on the workers of this dask.distributed scheduler.")
@shared.workers_option
@shared.json_option
def command(
    paths: tuple[str, ...],
    outs: tuple[Path, ...],
    resume: bool,
    no_duplicates: bool,
    memory: int,
    dask: str | None,
    workers: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Inspect every safetensors file and PEFT folder under each PATH: a file, folder, glob or fsspec URL.

    Exit 1 when any file is broken, 2 when one could not be judged; a file that cannot be read is a row with LH799, one
    without a known LoRA (a full checkpoint, say) a row with LH797, which is not broken and not judged.
    """
    from harness.doctor.audit.audit import AuditOptions, audit_into
    from harness.doctor.audit.output import write_rows

    known = _known(outs, resume)
    expanded = [path if "://" in path else str(Path(path).expanduser()) for path in paths]
    with (
        _executor(dask) as executor,
        progress("auditing", quiet=shared.quiet_on(as_json)) as line,
        _store(outs) as store,
    ):
        wanted = AuditOptions(
            workers=shared.worker_count(workers),
            executor=executor,
            memory=memory << 20,
            known=known,
            duplicates=not no_duplicates,
            on_start=line.start,
            on_row=lambda row: line.advance(),
            **options,
        )
        rows = audit_into(store, expanded, wanted, resume=resume)
        for out in outs:
            write_rows(out, rows)
        store.forget()
        code = _exit_code(rows)
        print_json(rows, code) if as_json else _print(rows, outs)
    sys.exit(code)


@contextmanager
def _store(outs: Sequence[Path]) -> Iterator[RowStore]:
    """Keep rows as they come in a file beside the first output, so that an audit that is killed can be resumed.

    The outputs themselves are replaced in one step when all rows are there: until then they stay as they are.
    """
    from harness.doctor.audit.output import beside
    from harness.doctor.audit.rows import RowStore, scratch
    from harness.outputs import only_writer

    with ExitStack() as opened:
        for out in outs:
            opened.enter_context(only_writer(out))
        yield opened.enter_context(closing(RowStore(beside(outs[0]))) if outs else scratch())


def _exit_code(rows: Sequence[FileRecord]) -> int:
    from harness.report.library import is_broken

    return 1 if any(map(is_broken, rows)) else 2 * any(row.is_other or "LH798" in row.codes for row in rows)


def _known(outs: Sequence[Path], resume: bool) -> Iterator[FileRecord]:
    from harness.doctor.audit.output import check_target, refuse_other_file, written_rows
    from harness.errors import UserError

    for out in outs:
        check_target(out)
        if not resume:
            refuse_other_file(out)
    if not resume:
        return iter(())
    if not outs:
        raise UserError("--resume needs --out FILE: the rows of an earlier audit (.jsonl, .json or .parquet)")
    return written_rows(outs[0])


@contextmanager
def _executor(address: str | None) -> Iterator[Executor | None]:
    if address is None:
        yield None
        return
    from harness.errors import UserError

    try:
        distributed = import_module("distributed")
    except ImportError:
        raise UserError("--dask needs dask.distributed: `pip install lora-harness[cluster]`") from None
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise UserError(f"--dask {address}: no scheduler answers ({type(error).__name__})") from None
    with client:
        executor = client.get_executor(retries=3)
        executor.has_workers = lambda: bool(client.scheduler_info()["workers"])
        yield executor


def _print(rows: Sequence[FileRecord], outs: Sequence[Path]) -> None:
    """Print what is wrong by code, broken files first, which findings hit, where broken files lie, and the sum."""
    from harness.report.library import Library, most_of

    library = Library(rows)
    for code, tally in library.by_gravity():
        _print_code(code, tally)
    for page, times, finding in library.hits():
        said = f": {finding.loader} {finding.measured}, {finding.what}" if finding else ""
        click.echo(printable(f"  {times:6,}  {'file hits' if times == 1 else 'files hit'} {page}{said}", 400))
    broken = [(name, tally) for name, tally in most_of(library.folders, _FOLDERS) if tally.broken]
    for name, tally in broken if len(library.folders) > 1 else ():
        click.echo(f"  {tally.broken:6,}  of {count(tally.files, 'file')} broken in {printable(name, 200)}")
    click.echo(library.headline)
    if any(row.modules and not row.weights_read for row in rows):
        click.echo("weights: not read; --energy looks for NaN, infinity and updates of zero in them (LH707, LH713)")
    for out in outs:
        click.echo(f"rows: {out}")


def _print_code(code: str, tally: Tally) -> None:
    """Print one code: how many files, the sentence once where it is the same for all, the first files."""
    from harness.report.links import code_link
    from harness.verdict.codes import CODES

    title = CODES[code].title if code in CODES else "not known here"
    said = f": {printable(tally.sentence, 240)}" if tally.sentence else ""
    page = f"  {code_link(code)}" if code_link(code) else ""
    click.echo(f"  {tally.files:6,}  {printable(code, 20)} {title}{said}{page}")
    for path, sentence in tally.first:
        click.echo(f"          {printable(path, 200)}{'' if tally.sentence else f': {printable(sentence, 200)}'}")
    if tally.files > len(tally.first):
        click.echo(f"          and {count(tally.files - len(tally.first), 'more file')}")
