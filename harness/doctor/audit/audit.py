"""Thousands of LoRA files, one row each: bad files are rows too, runs can be resumed, duplicates are found."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.doctor.audit import remote
from harness.doctor.audit.work import Task, run_local, run_on
from harness.doctor.inspect.describe import unreadable
from harness.errors import UserError
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME
from harness.verdict.file_record import FileRecord

_SUFFIX = ".safetensors"
_PICKLED = "adapter_model.bin"
Work = Callable[[Sequence[str], Task, Callable[[str, str], None]], None]


@dataclass(frozen=True)
class AuditOptions:
    """How a library is audited.

    Every file has `seconds` and `memory` bytes (over its own size); one that needs more is a row with hazard LH799. The
    work runs in `workers` children (0: here), or on `executor`, any `concurrent.futures.Executor` whose workers see the
    same files. Rows of `known` are taken over when size and modification time still agree. `on_start` gets the number
    of files, `on_row` each row when it is there.
    """

    energy: bool = False
    workers: int = 1
    executor: Executor | None = None
    seconds: float = 30.0
    memory: int = 1 << 30
    known: Iterable[FileRecord] = ()
    duplicates: bool = True
    schemes: Iterable[str] = remote.SCHEMES
    on_start: Callable[[int], None] = lambda total: None
    on_row: Callable[[FileRecord], None] = lambda row: None


def audit_files(paths: Iterable[Path | str], options: AuditOptions | None = None, **fields: Any) -> list[FileRecord]:
    """Return one row per safetensors file or PEFT folder under `paths`: files, folders, globs, URLs.

    The order is that of `find_files`, whatever order the work ends in. The fields of `options` may be given by keyword.

    Raises:
        UserError: a path names nothing, a URL scheme is not allowed, or there is no file at all.
    """
    options = replace(options or AuditOptions(), **fields)
    found = find_files(paths, schemes=options.schemes)
    if not found:
        raise UserError("no safetensors file and no PEFT folder under the given paths")
    options.on_start(len(found))
    work, memory = _work(options), options.memory
    rows = _rows(found, work, Task("row", options.energy, options.seconds, memory), options)
    return _marked(rows, work, Task("digest", False, 10 * options.seconds, memory)) if options.duplicates else rows


def _work(options: AuditOptions) -> Work:
    executor, workers = options.executor, options.workers
    if executor is not None:
        return lambda paths, task, done: run_on(executor, paths, task, on_result=done)
    return lambda paths, task, done: run_local(paths, task, workers=workers, on_result=done)


def _rows(found: Sequence[Found], work: Work, task: Task, options: AuditOptions) -> list[FileRecord]:
    known = {row.path: row for row in options.known if "LH798" not in row.codes}  # what was not judged is read again
    stamps = {file.path: file.stamp() for file in found}
    rows: dict[str, FileRecord] = {}

    def keep(path: str, row: FileRecord) -> None:
        size, mtime = stamps[path] or (None, None)
        rows[path] = row.model_copy(update={"size": size, "mtime": mtime})
        options.on_row(rows[path])

    for file in found:
        old = known.get(file.path)
        if file.problem:
            keep(file.path, unreadable(file.path, file.problem))
        elif old and stamps[file.path] == (old.size, old.mtime):
            keep(file.path, old.model_copy(update={"duplicate_of": None}))
    left = [file.path for file in found if file.path not in rows]
    work(left, task, lambda path, text: keep(path, FileRecord.model_validate_json(text)))
    return [rows[file.path] for file in found]


def _marked(rows: list[FileRecord], work: Work, task: Task) -> list[FileRecord]:
    """Say which files hold the same weights; only those with equal fingerprints are read completely."""
    groups: dict[str, list[FileRecord]] = {}
    for row in rows:
        if row.fingerprint and not remote.is_url(row.path):
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


@dataclass(frozen=True)
class Found:
    """One file or PEFT folder to audit; `problem` says why it must not be opened."""

    path: str
    problem: str | None = None

    def stamp(self) -> tuple[int, int] | None:
        """Return (bytes, modification time in ns) of the weights, None when they cannot be told."""
        if remote.is_url(self.path):
            return remote.stamp(self.path)
        try:
            status = _weights_status(self.path)
        except (OSError, ValueError):
            return None
        return status.st_size, status.st_mtime_ns


def find_files(paths: Iterable[Path | str], *, schemes: Iterable[str] = remote.SCHEMES) -> list[Found]:
    """Return what to audit under files, folders, globs and URLs, in the order given and sorted within each.

    Links inside a folder are followed only to files inside it; a file reached twice counts once.

    Raises:
        UserError: a path or glob that names nothing, or a URL whose scheme is not in `schemes`.
    """
    seen: set[tuple[int, int] | str] = set()
    return [found for path in paths for found in _under(str(path), tuple(schemes)) if _is_new(found, seen)]


def _weights_status(path: str) -> os.stat_result:
    status = os.stat(path)
    return os.stat(os.path.join(path, WEIGHTS_NAME)) if stat.S_ISDIR(status.st_mode) else status


def _is_new(found: Found, seen: set[tuple[int, int] | str]) -> bool:
    identity: tuple[int, int] | str = found.path
    if not remote.is_url(found.path) and not found.problem:
        try:
            status = _weights_status(found.path)
            identity = (status.st_dev, status.st_ino)
        except (OSError, ValueError):
            pass
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _under(path: str, schemes: tuple[str, ...]) -> Iterator[Found]:
    if remote.is_url(path):
        yield from (Found(url) for url in remote.find(path, schemes))
        return
    if os.path.lexists(path):
        yield from _local(Path(path))
        return
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise UserError(f"{path}: no such file or folder, and no glob that matches anything")
    for match in matches:
        if os.path.isdir(match) or match.endswith(_SUFFIX):
            yield from _local(Path(match))


def _local(path: Path) -> Iterator[Found]:
    if path.is_dir():
        yield from _walk(path, path.resolve())
    else:
        yield Found(str(path))


def _walk(folder: Path, root: Path) -> Iterator[Found]:
    """Yield what is in a folder, then in its folders; links to folders are never entered."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Found(str(folder), f"cannot be listed ({error.strerror or error})")
        return
    links = {entry.name: entry.is_symlink() for entry in entries}
    is_peft = {CONFIG_NAME, WEIGHTS_NAME} <= links.keys()
    if is_peft:
        yield _checked(folder / WEIGHTS_NAME, folder, root) if links[WEIGHTS_NAME] else Found(str(folder))
    elif _PICKLED in links:
        yield Found(str(folder))  # never opened; its row says so
    for entry in entries:
        taken = is_peft and entry.name == WEIGHTS_NAME
        if entry.name.endswith(_SUFFIX) and not entry.is_dir(follow_symlinks=False) and not taken:
            yield _checked(Path(entry.path), Path(entry.path), root) if links[entry.name] else Found(entry.path)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), root)


def _checked(file: Path, shown: Path, root: Path) -> Found:
    """Refuse a link that leads out of the root."""
    try:
        inside = file.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return Found(str(shown), "a link that leads nowhere")
    return Found(str(shown), None if inside else f"a link that leads out of {root}: not followed")
