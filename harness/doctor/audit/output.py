"""Rows of an audit to a file and back: .jsonl, .json, .csv, .parquet or .html by its extension."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from harness.errors import UserError
from harness.outputs import read_lines, replacing, saying
from harness.text import printable
from harness.verdict.file_record import FileRecord

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_RESUMABLE = (".jsonl", ".json", ".parquet")
_CHUNK_ROWS = 10_000
_WHOLE, _REAL = ("size", "modules"), ("trained_min", "trained_max", "coverage", "seconds")  # columns of numbers


def write_rows(path: Path | str, rows: Sequence[FileRecord]) -> Path:
    """Write rows in the format that the extension of `path` names, one by one, replacing the file in one step.

    Raises:
        UserError: an unknown extension, a place that cannot be written, or .parquet without pyarrow.
    """
    path = Path(path)
    write = _writer(path)
    with saying(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            write(rows, stream)
    return path


def check_target(path: Path | str) -> None:
    """Refuse a file that `write_rows` could not write, before any work is done.

    Raises:
        UserError: an unknown extension, or .parquet without pyarrow.
    """
    _writer(Path(path))


def read_rows(path: Path | str) -> list[FileRecord]:
    """Read rows back, also those of an audit that was killed; a cut last line is passed over.

    Raises:
        UserError: a format that does not hold whole rows, or a file that no audit wrote.
    """
    path = Path(path)
    if path.suffix.lower() not in _RESUMABLE and not beside(path).exists():
        raise UserError(f"{path}: only {', '.join(_RESUMABLE)} can be resumed: they hold whole rows")
    files = [path] if path.suffix.lower() in _RESUMABLE else []
    return [row for file in (*files, beside(path)) if file.exists() for row in _rows_of(file)]


def written_rows(path: Path) -> Iterator[FileRecord]:
    """Yield the rows of a file that an audit has finished, if there is one and its format holds whole rows.

    Raises:
        UserError: no audit wrote it, or neither it nor one that was killed left rows.
    """
    whole = path.suffix.lower() in _RESUMABLE
    if not whole and not beside(path).exists():
        raise UserError(f"{path}: only {', '.join(_RESUMABLE)} can be resumed: they hold whole rows")
    return _rows_of(path) if whole and path.exists() else iter(())


def beside(path: Path) -> Path:
    """Return where the rows of an audit stand until all of them are there."""
    return path.with_name(f"{path.name}.part.jsonl")


def refuse_other_file(path: Path) -> None:
    """Refuse to replace a file that an audit cannot have written.

    Raises:
        UserError: it is no file of rows.
    """
    if not path.exists() or not path.stat().st_size:
        return
    if path.suffix.lower() in _RESUMABLE:
        for _ in _rows_of(path):
            pass
        return
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if path.suffix.lower() in _MARKS and _MARKS[path.suffix.lower()] not in start:
        raise UserError(f"{path}: is no file that an audit wrote: name another file")


def _rows_of(path: Path) -> Iterator[FileRecord]:
    found: Counter[bool] = Counter()
    try:
        for row in map(_row, _texts(path)):
            found[row is not None] += 1
            if row:
                yield row
    except (ValidationError, ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no rows of an audit ({printable(error, 100)}): name another file") from None
    if found and not found[True]:
        raise UserError(f"{path}: holds no rows of an audit: name another file")


def _row(text: str | bytes) -> FileRecord | None:
    """Return a row, None for a line that was cut."""
    try:
        return FileRecord.model_validate_json(text)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            return None
        raise


def _texts(path: Path) -> Iterator[str | bytes]:
    if path.suffix.lower() == ".parquet":
        with path.open("rb") as stream:  # not mapped: somebody may cut it
            for batch in _parquet().ParquetFile(stream).iter_batches(_CHUNK_ROWS, columns=["record"]):
                yield from map(str, batch["record"].to_pylist())
    elif path.suffix.lower() == ".json" and not _has_a_row_a_line(path):
        yield from (json.dumps(row) for row in json.loads(path.read_text(encoding="utf-8")))
    else:
        lines = (line.removesuffix(b",") for _, line in read_lines(path))
        yield from (line for line in lines if line not in (b"[", b"]"))


def _has_a_row_a_line(path: Path) -> bool:
    """Tell whether a file is laid out as `_json` does it: else it has to be read as a whole."""
    first, second = (*islice((line for _, line in read_lines(path)), 2), b"", b"")[:2]
    return first == b"[" and (second == b"]" or (second.startswith(b'{"') and second.endswith((b"}", b"},"))))


def flat(row: FileRecord) -> dict[str, Any]:
    """Return one row as plain columns, lists joined."""
    low, high = row.trained or (None, None)
    return {
        **{name: getattr(row, name) for name in ("path", "size", "format", "modules")},
        **{name: _counts(getattr(row, name)) for name in ("ranks", "alphas")},
        "alpha_source": row.alpha_source,
        **{name: _counts(getattr(row, name)) for name in ("variants", "dtypes")},
        "trained_min": low,
        "trained_max": high,
        "coverage": row.coverage,
        "hazards": " ".join(row.codes),
        "what": "; ".join(hazard.what for hazard in row.hazards),
        "trainer": row.trainer,
        "duplicate_of": row.duplicate_of,
        "outlook": row.advice.outlook if row.advice else None,
        "seconds": row.seconds,
    }


def _counts(values: Mapping[str, int]) -> str:
    return " ".join(f"{value}x{times}" if times > 1 else value for value, times in values.items())


_COLUMNS = tuple(flat(FileRecord(path="")))
_MARKS = {".csv": ",".join(_COLUMNS[:5]).encode(), ".html": b"lora-harness"}


def _jsonl(rows: Sequence[FileRecord], stream: BinaryIO) -> None:
    for row in rows:
        stream.write(row.model_dump_json().encode() + b"\n")


def _json(rows: Sequence[FileRecord], stream: BinaryIO) -> None:
    stream.write(b"[\n")
    for number, row in enumerate(rows):
        stream.write((b",\n" if number else b"") + row.model_dump_json().encode())
    stream.write(b"\n]\n")


def _csv(rows: Sequence[FileRecord], stream: BinaryIO) -> None:
    text = io.TextIOWrapper(stream, "utf-8", "backslashreplace", newline="")
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in flat(row).items()} for row in rows)
    text.detach()  # all is written then, and the stream stays open


def _cell(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    safe = printable(value, 1000)
    return f"'{safe}" if safe.startswith(_FORMULA) else safe


def _html(rows: Sequence[FileRecord], stream: BinaryIO) -> None:
    from harness.report.audit_page import audit_page

    for part in audit_page(rows):
        stream.write(part.encode("utf-8", "backslashreplace"))


def _parquet_rows(rows: Sequence[FileRecord], stream: BinaryIO) -> None:
    pyarrow = import_module("pyarrow")
    types = {**dict.fromkeys(_WHOLE, pyarrow.int64()), **dict.fromkeys(_REAL, pyarrow.float64())}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in (*_COLUMNS, "record")])
    waiting = iter(rows)
    with _parquet().ParquetWriter(stream, schema) as writer:
        while chunk := list(islice(waiting, _CHUNK_ROWS)):
            lines = [{**flat(row), "record": row.model_dump_json()} for row in chunk]
            writer.write_table(pyarrow.Table.from_pylist(lines, schema=schema))


def _parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(".parquet needs pyarrow: `pip install pyarrow`, or write .jsonl or .csv") from None


Writer = Callable[[Sequence[FileRecord], BinaryIO], None]
_WRITERS: Mapping[str, Writer] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".html": _html, ".parquet": _parquet_rows,
}  # fmt: skip


def _writer(path: Path) -> Writer:
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise UserError(f"{path}: the extension says no format; known are {', '.join(_WRITERS)}")
    if suffix == ".parquet":
        _parquet()
    return _WRITERS[suffix]
