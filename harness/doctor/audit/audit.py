"""Thousands of LoRA files, one row each: bad files are rows too, runs can be resumed, duplicates are found."""

from __future__ import annotations

import glob
import os
import stat
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.doctor.audit import remote
from harness.doctor.audit.rows import Rows, RowStore, scratch
from harness.doctor.audit.work import Task, run_local, run_on
from harness.doctor.inspect.describe import not_judged, shown_path, unreadable
from harness.errors import UserError
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME
from harness.verdict.file_record import FileRecord

_SUFFIX = ".safetensors"
_PICKLED = "adapter_model.bin"
_WEIGHTS = (_SUFFIX, ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".npz")
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
    with scratch() as store:
        return list(audit_into(store, paths, replace(options or AuditOptions(), **fields)))


def audit_into(store: RowStore, paths: Iterable[Path | str], options: AuditOptions, *, resume: bool = False) -> Rows:
    """Do as `audit_files` does, with the rows in `store` and none in memory.

    With `resume`, rows that are in the store already are known too, and those of files that are not asked for are kept.
    """
    found = _once(find_files(paths, schemes=options.schemes))
    if not found:
        raise UserError("no safetensors file and no PEFT folder under the given paths")
    options.on_start(len(found))
    audit = _Audit(found, store, options)
    audit.take_over(resume)
    audit.read()
    rows = Rows(store, audit.places, audit.others)
    if options.duplicates:
        rows.digests, rows.firsts = audit.duplicates(rows)
    return rows


def _once(found: list[Found]) -> list[Found]:
    """Return every path once: a file that was replaced meanwhile can be found as two."""
    return list({file.path: file for file in found}.values())


class _Audit:
    """The files of one audit by position, and where in the store the row of each is (-1: nowhere yet).

    Of a million files everything that is kept counts: numbers stand in arrays, rows on the disk.
    """

    def __init__(self, found: Sequence[Found], store: RowStore, options: AuditOptions) -> None:
        self._found, self._store, self._options = found, store, options
        self._positions = {file.path: position for position, file in enumerate(found)}
        self._sizes, self._times = array("q"), array("q")
        for size, mtime in (file.stamp() or (-1, 0) for file in found):
            self._sizes.append(size)
            self._times.append(mtime)
        self.places, self.others = array("q", [-1]) * len(found), array("q")
        self._fingerprints = array("Q", [0]) * len(found)

    def take_over(self, resume: bool) -> None:
        """Keep the rows that are known and of which nothing has changed; to `resume`, those of other files too."""
        positions = self._shown_positions()
        seen: set[str] = set()
        for place, old in self._earlier(resume):
            position = positions.get(old.path)
            if position is None and resume and old.path not in seen:
                seen.add(old.path)
                self.others.append(self._store.add(old) if place is None else place)
            elif position is not None and self.places[position] < 0 and self._holds(position, old):
                old = old.model_copy(update={"duplicate_of": None})
                self._note(position, self._store.add(old) if place is None else place, old)

    def _shown_positions(self) -> dict[str, int]:
        """Return positions by path as rows spell it: bytes that are no UTF-8 are escaped there."""
        if all(file.path.isascii() for file in self._found):
            return self._positions
        shown: dict[str, int] = {}
        for path, position in self._positions.items():
            text = shown_path(path)
            shown[text] = -1 if text in shown else position  # of two that are spelled alike nobody can tell the rows
        return shown

    def _earlier(self, resume: bool) -> Iterator[tuple[int | None, FileRecord]]:
        if resume:
            yield from self._store.older()
        yield from ((None, row) for row in self._options.known)

    def _holds(self, position: int, old: FileRecord) -> bool:
        if position < 0 or self._found[position].problem or "LH798" in old.codes:
            return False  # what was not judged is read again
        same = (self._sizes[position], self._times[position]) == (old.size, old.mtime)
        return same and not (self._options.energy and old.readable and old.energies is None)

    def read(self) -> None:
        """Read every file of which there is no row yet."""
        for position, file in enumerate(self._found):
            if file.problem:
                row = unreadable if file.blamed else not_judged
                self._keep(position, row(file.path, file.problem))
        left = [file.path for position, file in enumerate(self._found) if self.places[position] < 0]
        task = Task("row", self._options.energy, self._options.seconds, self._options.memory)
        parsed = FileRecord.model_validate_json
        _work(self._options)(left, task, lambda path, text: self._keep(self._positions[path], parsed(text)))

    def _keep(self, position: int, row: FileRecord) -> None:
        size, mtime = self._sizes[position], self._times[position]
        row = row.model_copy(update={"size": size, "mtime": mtime} if size >= 0 else {"size": None, "mtime": None})
        self._note(position, self._store.add(row), row)

    def _note(self, position: int, place: int, row: FileRecord) -> None:
        self.places[position] = place
        if row.fingerprint and not remote.is_url(row.path):
            self._fingerprints[position] = int(row.fingerprint[:16], 16)
        self._options.on_row(row)

    def duplicates(self, rows: Rows) -> tuple[dict[int, str | None], dict[int, int]]:
        """Return digests and the first file with the same; only those with equal fingerprints are read completely."""
        alike = self._alike()
        digests: dict[int, str | None] = {}
        for position in alike:
            if mark := rows.unmarked(position).digest:
                digests[position] = sys.intern(mark)

        def hashed(path: str, text: str) -> None:
            digests[self._positions[path]] = sys.intern(text) if text else None

        left = [self._found[position].path for position in alike if position not in digests]
        task = Task("digest", False, 10 * self._options.seconds, self._options.memory)
        _work(self._options)(left, task, hashed)
        first: dict[str, int] = {}
        marks = ((position, digests.get(position)) for position in alike)
        firsts = {position: first.setdefault(mark, position) for position, mark in marks if mark}
        return digests, {position: origin for position, origin in firsts.items() if origin != position}

    def _alike(self) -> list[int]:
        """Return the positions whose fingerprint another file has too, in order."""
        prints = self._fingerprints
        ordered = sorted((position for position, mark in enumerate(prints) if mark), key=prints.__getitem__)
        groups = (list(group) for _, group in groupby(ordered, key=prints.__getitem__))
        return sorted(position for group in groups if len(group) > 1 for position in group)


def _work(options: AuditOptions) -> Work:
    executor, workers = options.executor, options.workers
    if executor is not None:
        return lambda paths, task, done: run_on(executor, paths, task, on_result=done)
    return lambda paths, task, done: run_local(paths, task, workers=workers, on_result=done)


@dataclass(frozen=True, slots=True)
class Found:
    """One file or PEFT folder to audit; `problem` says why it must not be opened, `blamed` that it is the file's."""

    path: str
    problem: str | None = None
    blamed: bool = True

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
    seen: set[int | str] = set()
    return [found for path in paths for found in _under(str(path), tuple(schemes)) if _is_new(found, seen)]


def _weights_status(path: str) -> os.stat_result:
    status = os.stat(path)
    return os.stat(os.path.join(path, WEIGHTS_NAME)) if stat.S_ISDIR(status.st_mode) else status


def _is_new(found: Found, seen: set[int | str]) -> bool:
    identity: int | str = found.path
    if not remote.is_url(found.path) and not found.problem:
        try:
            status = _weights_status(found.path)
            identity = status.st_dev << 64 | status.st_ino  # a third of the memory of a pair
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
        if os.path.isdir(match) or _is_lora(match):
            yield from _local(Path(match))


def _is_lora(name: str) -> bool:
    return name.lower().endswith(_SUFFIX)


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
    elif _PICKLED in links or (CONFIG_NAME in links and not any(name.lower().endswith(_WEIGHTS) for name in links)):
        yield Found(str(folder))  # never opened, or without weights; its row says so
    for entry in entries:
        taken = is_peft and entry.name == WEIGHTS_NAME
        if _is_lora(entry.name) and not entry.is_dir(follow_symlinks=False) and not taken:
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
    return Found(str(shown), None if inside else f"a link that leads out of {root}: not followed", blamed=False)
