"""Write a run line by line, read it back, and merge the parts of several workers or machines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TextIO, TypeVar

from pydantic import ValidationError

from harness.errors import UserError
from harness.outputs import LineWriter, only_writer, saying, text_of
from harness.report.models import (
    ADAPTER,
    SCHEMA_VERSION,
    AnyRecord,
    Footer,
    Header,
    PartRecord,
    PowerRecord,
    ProbeRecord,
    SweepRecord,
)
from harness.verdict.file_record import FileRecord
from harness.verdict.verdict import Carried, Record, Verdict

R = TypeVar("R", bound=Record)
_MEASUREMENTS = FileRecord | PowerRecord
VIOLATIONS = ("failed", "errored", "refused", "xpassed")


@dataclass(frozen=True)
class Run:
    """A run read back: `folder` resolves image paths, `cut` says why the run is not whole (None: it is)."""

    header: Header
    records: tuple[AnyRecord, ...] = ()
    footer: Footer | None = None
    folder: Path = Path()
    cut: str | None = None
    path: Path | None = None

    def of(self, kind: type[R]) -> tuple[R, ...]:
        """Return the records of one class, in the order in which they were written."""
        return tuple(record for record in self.records if isinstance(record, kind))

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts, in the order in which they were written."""
        return self.of(Verdict)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Verdicts by outcome, counted from the records themselves."""
        return counts_of(self.verdicts)

    @cached_property
    def carried(self) -> dict[Carried, int]:
        """How many cells were carried over instead of measured, by where they come from."""
        cells = {(v.carried, v.loader, v.format, v.bench, v.variant) for v in self.verdicts if v.carried}
        return dict(Counter(where for where, *_ in cells))

    @cached_property
    def missing(self) -> tuple[PartRecord, ...]:
        """The planned parts that were not measured, each with the reason."""
        reported = {part.name: part for part in self.of(PartRecord) if not part.measured}
        absent = (name for name in self.header.planned if name not in reported and not self.measured(name))
        never = (PartRecord(name=name, measured=False, reason="planned, but never ran") for name in absent)
        return (*reported.values(), *never)

    @property
    def status(self) -> str:
        """`cut` without a footer, `failed` on a violation, `incomplete` when a planned part is missing, or `passed`."""
        if self.footer is None or self.cut:
            return "cut"
        measured = is_measured(self.counts) or any(isinstance(record, _MEASUREMENTS) for record in self.records)
        code = self.footer.exit_code
        if code == 1 or (code and measured) or not all(verdict.ok for verdict in self.verdicts):
            return "failed"
        return "incomplete" if self.missing or not measured else "passed"

    def measured(self, part: str) -> bool:
        """Return True when a planned part has a record of its own kind (a skipped verdict is none)."""
        if any(record.name == part and record.measured for record in self.of(PartRecord)):
            return True
        kind, _, rest = part.partition(":")
        kind, _, device = kind.partition("@")
        loader, _, loader_device = rest.partition("@")
        return any(_belongs(record, kind, loader, device or loader_device) for record in self.records)


def _belongs(record: AnyRecord, kind: str, loader: str, device: str) -> bool:
    kinds = {"checks": Verdict, "law": ProbeRecord, "sweep": SweepRecord, "files": FileRecord, "power": PowerRecord}
    if not isinstance(record, kinds.get(kind, ())) or getattr(record, "outcome", None) == "skipped":
        return False
    right_loader = not loader or getattr(record, "loader", None) == loader
    return right_loader and (not device or str(getattr(record, "device", "")).startswith(device))


class RunWriter:
    """Append the records of one run to `path`, one flushed JSON line each, and to `echo` when given.

    A context manager: the header is written on entry, the footer on a normal exit. After an exception there is no
    footer, so what ran stays readable and the run is red. `exit_code` overrides the one derived from the verdicts,
    `reference` says what PEFT was asked. `gate` says, where there is a baseline, what got worse than
    in it, which decides.
    """

    def __init__(self, path: Path | str | None, header: Header, *, echo: TextIO | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.header, self.reference = header, ""
        self.exit_code: int | None = None
        self.gate: Callable[[Run], Sequence[str]] | None = None
        self._echo = echo
        self._file: LineWriter | None = None
        self._open = ExitStack()
        self._counts: Counter[str] = Counter()
        self._measured = False
        self._started = time.monotonic()

    def __enter__(self) -> RunWriter:
        with ExitStack() as opened:
            if self.path is not None:
                opened.enter_context(only_writer(self.path))
                with saying(self.path):
                    self.path.write_bytes(b"")
                    self._file = opened.enter_context(closing(LineWriter(self.path)))
            self.write(self.header)
            self._open = opened.pop_all()
        return self

    def write(self, *records: Record) -> None:
        """Append records; verdicts are counted for the footer."""
        for record in records:
            if isinstance(record, Verdict):
                self._counts[record.outcome] += 1
            self._measured |= isinstance(record, _MEASUREMENTS)
            self._append(record.model_dump_json())

    def _append(self, line: str) -> None:
        if self._echo is not None:
            print(line, file=self._echo, flush=True)
        if self._file is not None:
            with saying(self.path or ""):
                self._file.write(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.write(self._judged(self._footer()))
        self._open.close()

    def _footer(self) -> Footer:
        code = self.exit_code
        if code is None:
            code = 0 if self._measured and not self._counts else exit_code_of(self._counts)
        seconds = round(time.monotonic() - self._started, 3)
        return Footer(counts=dict(self._counts), seconds=seconds, exit_code=code, reference=self.reference)

    def _judged(self, footer: Footer) -> Footer:
        if self.gate is None or self.path is None:
            return footer
        worse = tuple(self.gate(replace(read_run(self.path), footer=footer, cut=None)))
        code = 1 if worse else 2 if footer.exit_code == 2 else 0
        return footer.model_copy(update={"gate": worse, "exit_code": code})


def counts_of(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Return how many verdicts have each outcome."""
    return dict(Counter(str(verdict.outcome) for verdict in verdicts))


def is_measured(counts: Mapping[str, int]) -> bool:
    """Tell whether any verdict, by outcome, says what a loader does: one that was skipped does not."""
    return any(number for outcome, number in counts.items() if outcome != "skipped")


def exit_code_of(counts: Mapping[str, int]) -> int:
    """Return 1 when any verdict is a violation, 2 when none says anything, else 0: a green is earned."""
    if any(counts.get(outcome, 0) for outcome in VIOLATIONS):
        return 1
    return 0 if is_measured(counts) else 2


def read_run(path: Path | str) -> Run:
    """Read a run file. A truncated last line is tolerated and makes a cut run.

    Raises:
        UserError: the file cannot be read, has no header, or a line is not a record (file and line are named).
    """
    path = Path(path)
    records, cut = _read_records(path)
    if not records or not isinstance(records[0], Header):
        raise UserError(f"{path}:1: no header: a run file written by lora-harness starts with a header line")
    footers = [record for record in records if isinstance(record, Footer)]
    if not footers:
        cut = cut or "the run has no footer: it stopped before it was done"
    body = tuple(record for record in records[1:] if not isinstance(record, Footer))
    return Run(records[0], body, footers[-1] if footers else None, path.parent, cut, path)


def _read_records(path: Path) -> tuple[list[AnyRecord], str | None]:
    lines = _lines(path)
    records: list[AnyRecord] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(ADAPTER.validate_json(line))
        except ValidationError as error:
            if number == len(lines) and error.errors()[0]["type"] == "json_invalid":
                return records, f"the last line ({number}) is truncated"
            what = f"{first_problem(error, depth=1)} (the line starts {line[:60]!r})"
            raise UserError(f"{path}:{number}: not a record: {what}") from None
        _refuse_newer(path, records[-1])
    return records, None


def _lines(path: Path) -> list[str]:
    try:
        return text_of(path).rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a run file: byte {error.start} is not UTF-8 text") from None


def first_problem(error: ValidationError, depth: int = 0) -> str:
    """Say what is wrong with a line, and at which of its fields, whose path begins at `depth`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][depth:]) or "the line"
    return f"{where}: {first['msg']}"


def _refuse_newer(path: Path, record: AnyRecord) -> None:
    if isinstance(record, Header) and record.schema_version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version={record.schema_version} is newer than {SCHEMA_VERSION}, which is what this "
            "lora-harness reads; update lora-harness"
        )


def merge_runs(runs: Sequence[Run]) -> Run:
    """Join runs (workers of one run, or several machines) into one: cut or red when any part is.

    Raises:
        UserError: there is no run to merge.
    """
    if not runs:
        raise UserError("no run to report: name at least one run file (RUN.jsonl)")
    if len(runs) == 1:
        return runs[0]
    records = tuple(record for run in runs for record in _rebased(run) if not _done_elsewhere(record, runs))
    cuts = [f"{run.header.run_id}: {run.cut}" for run in runs if run.cut]
    header = _joined_header([run.header for run in runs])
    return Run(header, records, _joined_footer(runs), Path(), "; ".join(cuts) or None)


def _done_elsewhere(record: AnyRecord, runs: Sequence[Run]) -> bool:
    return isinstance(record, PartRecord) and not record.measured and any(run.measured(record.name) for run in runs)


def _joined_header(headers: list[Header]) -> Header:
    newest = max(headers, key=lambda header: header.created)
    versions = {name: version for header in headers for name, version in header.versions.items()}
    planned = dict.fromkeys(part for header in headers for part in header.planned)
    return newest.model_copy(
        update={
            "run_id": _unique(header.run_id for header in headers),
            "machine": _unique(header.machine for header in headers),
            "device": _unique(header.device for header in headers),
            "command": _unique((header.command for header in headers), " && "),
            "versions": versions,
            "planned": tuple(planned),
        }
    )


def _joined_footer(runs: Sequence[Run]) -> Footer | None:
    footers = [run.footer for run in runs if run.footer is not None]
    if len(footers) < len(runs):
        return None
    counts = Counter[str]()
    for footer in footers:
        counts.update(footer.counts)
    codes = {footer.exit_code for footer in footers}
    code = 1 if 1 in codes else 0 if 0 in codes else 2  # what one machine did not measure another may have
    seconds, reference = max(footer.seconds for footer in footers), _unique(footer.reference for footer in footers)
    return Footer(counts=dict(counts), seconds=seconds, exit_code=code, reference=reference)


def _unique(values: Iterable[str], separator: str = ", ") -> str:
    return separator.join(dict.fromkeys(value for value in values if value))


def rebased(run: Run) -> Run:
    """Return the run with absolute image paths, to be written or merged elsewhere."""
    return replace(run, records=_rebased(run), folder=Path(), path=None)


def _rebased(run: Run) -> tuple[AnyRecord, ...]:
    return tuple(_absolute(record, run.folder) if isinstance(record, SweepRecord) else record for record in run.records)


def _absolute(record: SweepRecord, folder: Path) -> SweepRecord:
    def full(path: str | None) -> str | None:
        return path and str((folder / path).resolve())

    moved = ({"path": full(image.path), "thumbnail": full(image.thumbnail)} for image in record.images)
    images = tuple(image.model_copy(update=paths) for image, paths in zip(record.images, moved, strict=True))
    return record.model_copy(update={"images": images})
