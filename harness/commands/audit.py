"""`lora-harness audit`: thousands of LoRA files, one row each."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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

    from harness.verdict.file_record import FileRecord

_SHOWN = 30


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

    Exit 1 when any file is broken, 2 when one could not be judged; a file that cannot be read is a row with LH799.
    """
    from harness.doctor.audit.audit import audit_files
    from harness.doctor.audit.output import beside, write_rows

    known = _known(outs, resume)
    expanded = [path if "://" in path else str(Path(path).expanduser()) for path in paths]
    with _executor(dask) as executor, progress("auditing", quiet=shared.quiet_on(as_json)) as line, _kept(outs) as keep:

        def on_row(row: FileRecord) -> None:
            keep(row)
            line.advance()

        rows = audit_files(
            expanded,
            workers=shared.worker_count(workers),
            executor=executor,
            memory=memory << 20,
            known=known,
            duplicates=not no_duplicates,
            on_start=line.start,
            on_row=on_row,
            **options,
        )
        rows += _others(known, rows)
        for out in outs:
            write_rows(out, rows)
    if outs:
        beside(outs[0]).unlink(missing_ok=True)
    code = int(any(row.severity in ("fatal", "error") for row in rows))
    code = code or 2 * any("LH798" in row.codes for row in rows)
    print_json(rows, code) if as_json else _print(rows, outs)
    sys.exit(code)


@contextmanager
def _kept(outs: Sequence[Path]) -> Iterator[Callable[[FileRecord], None]]:
    """Append rows as they come to a file beside the first output, so that an audit that is killed can be resumed.

    The outputs themselves are replaced in one step when all rows are there: until then they stay as they are.
    """
    from harness.doctor.audit.output import beside
    from harness.outputs import LineWriter, only_writer, saying

    with ExitStack() as opened:
        for out in outs:
            opened.enter_context(only_writer(out))
        if not outs:
            yield lambda row: None
            return
        with saying(outs[0]):
            lines = opened.enter_context(closing(LineWriter(beside(outs[0]))))
        yield lambda row: lines.write(row.model_dump_json())


def _others(known: Sequence[FileRecord], rows: Sequence[FileRecord]) -> list[FileRecord]:
    """Return the rows of an earlier audit whose files were not asked for now: they are kept."""
    asked = {row.path for row in rows}
    return list({row.path: row for row in known if row.path not in asked}.values())


def _known(outs: Sequence[Path], resume: bool) -> list[FileRecord]:
    from harness.doctor.audit.output import check_target, read_rows, refuse_other_file
    from harness.errors import UserError

    for out in outs:
        check_target(out)
        if not resume:
            refuse_other_file(out)
    if not resume:
        return []
    if not outs:
        raise UserError("--resume needs --out FILE: the rows of an earlier audit (.jsonl, .json or .parquet)")
    return read_rows(outs[0])


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
    from harness.verdict.codes import CODES

    bad = [row for row in rows if row.hazards]
    for row in bad[:_SHOWN]:
        first = row.hazards[0]
        more = f" (and {len(row.hazards) - 1} more)" if len(row.hazards) > 1 else ""
        click.echo(f"{printable(row.path, 200)}: {first.code} {printable(first.what, 200)}{more}")
    if len(bad) > _SHOWN:
        click.echo(f"and {count(len(bad) - _SHOWN, 'more file')} with hazards")
    for code, times in Counter(code for row in rows for code in set(row.codes)).most_common():
        click.echo(f"  {times:6,}  {code} {CODES[code].title}")
    for page, times in Counter(page for row in rows for page in row.findings).most_common():
        click.echo(f"  {times:6,}  {'file hits' if times == 1 else 'files hit'} {page}")
    twins = sum(row.duplicate_of is not None for row in rows)
    click.echo(
        f"{count(len(rows), 'file')}, {len(rows) - len(bad)} without hazards, {twins} with the weights of another"
    )
    for out in outs:
        click.echo(f"rows: {out}")
