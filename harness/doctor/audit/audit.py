"""Thousands of LoRA files, one row each: bad files are rows too, runs can be resumed, duplicates are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from harness.doctor.audit.find import Found, find_files
from harness.doctor.audit.remote import SCHEMES, is_url
from harness.doctor.audit.rows import AuditRow, failed_row
from harness.doctor.audit.work import Task, row_of, run_local, run_on
from harness.errors import UserError

OnRow = Callable[[AuditRow], None]
Work = Callable[[Sequence[str], Task, Callable[[str, str], None]], None]


def audit_files(
    paths: Iterable[Path | str],
    *,
    energy: bool = False,
    workers: int = 1,
    executor: Executor | None = None,
    seconds: float = 30.0,
    memory: int = 1 << 30,
    known: Iterable[AuditRow] = (),
    duplicates: bool = True,
    schemes: Iterable[str] = SCHEMES,
    on_start: Callable[[int], None] = lambda total: None,
    on_row: OnRow = lambda row: None,
) -> list[AuditRow]:
    """Return one row per safetensors file or PEFT folder under `paths`: files, folders, globs, URLs.

    The order is that of `find_files`, whatever order the work ends in; `on_row` gets each row when it is there. Every
    file has `seconds` and `memory` bytes (over its own size); one that needs more is a row with hazard LH799. Rows of
    `known` are taken over when size and modification time still agree. The work runs in `workers` children (0: here),
    or on `executor`, any `concurrent.futures.Executor` whose workers see the same files.

    Raises:
        UserError: a path names nothing, a URL scheme is not allowed, or there is no file at all.
    """
    found = find_files(paths, schemes=schemes)
    if not found:
        raise UserError("no safetensors file and no PEFT folder under the given paths")
    on_start(len(found))
    work = _work(executor, workers)
    rows = _rows(found, {row.path: row for row in known}, work, Task("row", energy, seconds, memory), on_row)
    return _marked(rows, work, Task("digest", False, 10 * seconds, memory)) if duplicates else rows


def _work(executor: Executor | None, workers: int) -> Work:
    if executor is not None:
        return lambda paths, task, done: run_on(executor, paths, task, on_result=done)
    return lambda paths, task, done: run_local(paths, task, workers=workers, on_result=done)


def _rows(found: Sequence[Found], known: dict[str, AuditRow], work: Work, task: Task, on_row: OnRow) -> list[AuditRow]:
    stamps = {file.path: file.stamp() for file in found}
    rows: dict[str, AuditRow] = {}

    def keep(path: str, row: AuditRow) -> None:
        size, mtime = stamps[path] or (None, None)
        rows[path] = row.model_copy(update={"size": size, "mtime": mtime})
        on_row(rows[path])

    for file in found:
        old = known.get(file.path)
        if file.problem:
            keep(file.path, failed_row(file.path, file.problem))
        elif old and stamps[file.path] == (old.size, old.mtime):
            keep(file.path, old.model_copy(update={"duplicate_of": None}))
    left = [file.path for file in found if file.path not in rows]
    work(left, task, lambda path, text: keep(path, row_of(text)))
    return [rows[file.path] for file in found]


def _marked(rows: list[AuditRow], work: Work, task: Task) -> list[AuditRow]:
    """Say which files hold the same weights; only those with equal fingerprints are read completely."""
    groups: dict[str, list[AuditRow]] = {}
    for row in rows:
        if row.fingerprint and not is_url(row.path):
            groups.setdefault(row.fingerprint, []).append(row)
    alike = [row for group in groups.values() if len(group) > 1 for row in group]
    digests: dict[str, str | None] = {row.path: row.digest for row in alike if row.digest}
    work([row.path for row in alike if not row.digest], task, lambda path, text: digests.update({path: text or None}))
    first: dict[str, str] = {}
    marked = []
    for row in rows:
        mark = digests.get(row.path)
        same = first.setdefault(mark, row.path) if mark else row.path
        marked.append(row.model_copy(update={"digest": mark, "duplicate_of": same if same != row.path else None}))
    return marked
