"""`lora-harness audit`: thousands of LoRA files, one row each."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from rich.progress import Progress

    from harness.doctor.audit.rows import AuditRow

_SHOWN = 30
_REDRAW_SECONDS = 0.25


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness audit ~/loras --out rows.jsonl --out rows.html\n"
    "  lora-harness audit '~/loras/**/*.safetensors' --out rows.jsonl --resume"
)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--out", "outs", multiple=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write the rows: .jsonl, .json, .csv, .parquet or .html; repeat for more.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Take over the rows of --out whose file has the same size and time.")
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
    dask: str | None,
    workers: int | None,
    as_json: bool,
    **limits: Any,
) -> None:
    """Inspect every safetensors file and PEFT folder under each PATH: a file, folder, glob or fsspec URL.

    Exit 1 when any file is broken; a file that cannot be read is a row with hazard LH799.
    """
    from harness.commands.inspect import UNREADABLE
    from harness.doctor.audit.audit import AuditOptions, audit_files
    from harness.doctor.audit.output import write_rows
    from harness.verdict.file_record import VIOLATIONS

    known = _known(outs, resume)
    expanded = [path if "://" in path else str(Path(path).expanduser()) for path in paths]
    with _executor(dask) as executor, _progress(quiet=shared.quiet_on(as_json)) as bar, _Sink(outs, bar) as sink:
        options = AuditOptions(
            energy=limits["energy"],
            workers=shared.worker_count(workers),
            executor=executor,
            seconds=limits["seconds"],
            memory=limits["memory"] << 20,
            known=known,
            duplicates=not limits["no_duplicates"],
            on_start=bar.start,
            on_row=sink.write,
        )
        rows = audit_files(expanded, options)
    for out in outs:
        write_rows(out, rows)
    code = int(any({*VIOLATIONS, UNREADABLE} & set(row.codes) for row in rows))
    _write_json(rows, code) if as_json else _print(rows, outs)
    sys.exit(code)


class _Bar:
    """How far the audit is, redrawn by hand: a refreshing thread must not run while children are forked."""

    def __init__(self, shown: Progress | None) -> None:
        self._shown, self._done, self._drawn = shown, 0, 0.0
        self._task = shown.add_task("auditing", total=None) if shown else None

    def start(self, total: int) -> None:
        if self._shown and self._task is not None:
            self._shown.update(self._task, total=total)

    def advance(self) -> None:
        self._done += 1
        if self._shown and self._task is not None and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._shown.update(self._task, completed=self._done)
            self._shown.refresh()
            self._drawn = time.monotonic()


class _Sink:
    """Rows to the first .jsonl file as they come, so that a killed audit can be resumed; each moves the bar."""

    def __init__(self, outs: Sequence[Path], bar: _Bar) -> None:
        self._bar = bar
        self._path = next((out for out in outs if out.suffix.lower() == ".jsonl"), None)
        self._file: Any = None

    def __enter__(self) -> _Sink:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8", newline="\n")
        return self

    def write(self, row: AuditRow) -> None:
        self._bar.advance()
        if self._file:
            self._file.write(row.model_dump_json() + "\n")
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def _known(outs: Sequence[Path], resume: bool) -> list[AuditRow]:
    from harness.doctor.audit.output import check_target, read_rows
    from harness.errors import UserError

    for out in outs:
        check_target(out)
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
        yield client.get_executor(retries=3)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[_Bar]:
    """Show a bar on stderr."""
    if quiet:
        yield _Bar(None)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as shown:
        yield _Bar(shown)


def _write_json(rows: Sequence[AuditRow], code: int) -> None:
    from harness.report.environment import new_header
    from harness.report.records import RunWriter

    with RunWriter(None, new_header(), echo=sys.stdout) as writer:
        writer.write(*rows)
        writer.exit_code = code


def _print(rows: Sequence[AuditRow], outs: Sequence[Path]) -> None:
    from harness.text import count, printable
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
    twins = sum(row.duplicate_of is not None for row in rows)
    click.echo(
        f"{count(len(rows), 'file')}, {len(rows) - len(bad)} without hazards, {twins} with the weights of another"
    )
    for out in outs:
        click.echo(f"rows: {out}")
