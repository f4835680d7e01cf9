"""Rows of an audit to a file and back: .jsonl, .json, .csv, .parquet or .html by its extension."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import UserError
from harness.outputs import read_lines, replace_file
from harness.text import printable
from harness.verdict.file_record import FileRecord

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_RESUMABLE = (".jsonl", ".json", ".parquet")


def write_rows(path: Path | str, rows: Sequence[FileRecord]) -> Path:
    """Write rows in the format that the extension of `path` names, replacing the file in one step.

    Raises:
        UserError: an unknown extension, a place that cannot be written, or .parquet without pyarrow.
    """
    path = Path(path)
    content = _writer(path)(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def check_target(path: Path | str) -> None:
    """Refuse a file that `write_rows` could not write, before any work is done.

    Raises:
        UserError: an unknown extension, or .parquet without pyarrow.
    """
    _writer(Path(path))([])


def read_rows(path: Path | str) -> list[FileRecord]:
    """Read rows back to resume; a cut last line is passed over.

    Raises:
        UserError: a format that does not hold whole rows, or a file that no audit wrote.
    """
    path = Path(path)
    if path.suffix.lower() not in _RESUMABLE and not beside(path).exists():
        raise UserError(f"{path}: only {', '.join(_RESUMABLE)} can be resumed: they hold whole rows")
    files = [path] if path.suffix.lower() in _RESUMABLE else []
    return [row for file in (*files, beside(path)) if file.exists() for row in _rows_of(file)]


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
        _rows_of(path)
        return
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if path.suffix.lower() in _MARKS and _MARKS[path.suffix.lower()] not in start:
        raise UserError(f"{path}: is no file that an audit wrote: name another file")


def _rows_of(path: Path) -> list[FileRecord]:
    try:
        rows = list(map(_row, _texts(path)))
    except (ValidationError, ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no rows of an audit ({printable(error, 100)}): name another file") from None
    if rows and not any(rows):
        raise UserError(f"{path}: holds no rows of an audit: name another file")
    return [row for row in rows if row]


def _row(text: str | bytes) -> FileRecord | None:
    """Return a row, None for a line that was cut."""
    try:
        return FileRecord.model_validate_json(text)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            return None
        raise


def _texts(path: Path) -> Iterable[str | bytes]:
    if path.suffix.lower() == ".parquet":
        return [str(text) for text in _parquet().read_table(path, columns=["record"])["record"].to_pylist()]
    if path.suffix.lower() == ".json":
        return [json.dumps(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    return (line for _, line in read_lines(path))


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


def _jsonl(rows: Sequence[FileRecord]) -> bytes:
    return "".join(row.model_dump_json() + "\n" for row in rows).encode()


def _json(rows: Sequence[FileRecord]) -> bytes:
    return ("[\n" + ",\n".join(row.model_dump_json() for row in rows) + "\n]\n").encode()


def _csv(rows: Sequence[FileRecord]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in flat(row).items()} for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    safe = printable(value, 1000)
    return f"'{safe}" if safe.startswith(_FORMULA) else safe


def _html(rows: Sequence[FileRecord]) -> bytes:
    from harness.report.lora_page import render_audit_page

    return render_audit_page(rows).encode("utf-8", "backslashreplace")


def _parquet_bytes(rows: Sequence[FileRecord]) -> bytes:
    pyarrow = import_module("pyarrow")
    lines = [{**flat(row), "record": row.model_dump_json()} for row in rows]
    columns = {name: [line[name] for line in lines] for name in (*_COLUMNS, "record")}
    sink = io.BytesIO()
    _parquet().write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def _parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(".parquet needs pyarrow: `pip install pyarrow`, or write .jsonl or .csv") from None


_WRITERS: Mapping[str, Callable[[Sequence[FileRecord]], bytes]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".html": _html, ".parquet": _parquet_bytes,
}  # fmt: skip


def _writer(path: Path) -> Callable[[Sequence[FileRecord]], bytes]:
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise UserError(f"{path}: the extension says no format; known are {', '.join(_WRITERS)}")
    if suffix == ".parquet":
        _parquet()
    return _WRITERS[suffix]
