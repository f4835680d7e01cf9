"""The rows of an audit: of one file what `inspect` says and what tells it from others, and all of them on the disk."""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from harness.doctor.audit import remote
from harness.doctor.inspect.describe import read_record, unreadable
from harness.errors import LoraFileError, UserError
from harness.files import TensorFile
from harness.files.read import open_source
from harness.files.tensor_file import CUT, os_problem
from harness.outputs import LineWriter, saying
from harness.verdict.file_record import FileRecord

_SAMPLE_BYTES = 4096
_CHUNK_BYTES = 1 << 20


def audit_file(path: str, *, energy: bool = False) -> FileRecord:
    """Return the row of one local file, PEFT folder or URL; whatever is wrong with it is in the row."""
    began = time.perf_counter()
    try:
        if remote.is_url(path):
            with remote.local_copy(path) as copy:
                read = read_record(copy, headers_only=True, reasons=False)[0]
                record, mark = read.model_copy(update={"path": path}), None
        else:
            record, adapter = read_record(path, energy=energy, headers_only=not energy, reasons=False)
            mark = fingerprint(adapter.file) if adapter else None
    except UserError as error:
        return unreadable(path, str(error))
    told: dict[str, object] = {
        "seconds": round(time.perf_counter() - began, 4),
        "fingerprint": mark,
    }
    return record.model_copy(update=told)


def fingerprint(file: TensorFile) -> str:
    """Return a hash of the names and shapes of all tensors and of the first bytes of three of them."""
    names = sorted(file.tensors)
    some = sorted({names[0], names[len(names) // 2], names[-1]}) if names else []
    return _hashed(file, names, some, _SAMPLE_BYTES)


def digest(path: Path | str) -> str:
    """Return a hash of the names, shapes and bytes of all tensors, in the order of their names.

    Raises:
        LoraFileError: the file cannot be read.
    """
    file = open_source(path).file
    names = sorted(file.tensors)
    return _hashed(file, names, names, None)


def _hashed(file: TensorFile, names: Sequence[str], read: Iterable[str], limit: int | None) -> str:
    total = hashlib.blake2b(digest_size=16)
    infos = [file.tensors[name] for name in names]
    shapes = [info.shape for info in infos]
    shown = {shape: str(shape) for shape in set(shapes)}
    listed = f"[{', '.join([shown[shape] for shape in shapes])}]"
    plain = not any("\n" in name or "\0" in name for name in names)  # else two lists of names can make one text
    header = ["\n".join(names) if plain else json.dumps(names), " ".join([info.dtype for info in infos]), listed]
    total.update("\0".join(header).encode("utf-8", "surrogatepass"))
    for block in _blocks(file, read, limit):
        total.update(block)
    return total.hexdigest()


def _blocks(file: TensorFile, names: Iterable[str], limit: int | None) -> Iterator[bytes]:
    try:
        with file.path.open("rb", buffering=0) as stream:
            for name in names:
                info = file.tensors[name]
                left = min(info.end - info.start, limit or info.end)
                stream.seek(info.start)
                while left > 0 and (block := stream.read(min(left, _CHUNK_BYTES))):
                    left -= len(block)
                    yield block
                if left > 0:
                    raise LoraFileError(file.path, CUT)
    except OSError as error:
        raise LoraFileError(file.path, os_problem(error)) from error


class RowStore:
    """A file of rows that only grows, one JSON line each; a row is found again by the byte at which it begins.

    Rows that a killed audit left in it stay.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._is_needed = path, True
        with saying(path):
            self._lines = LineWriter(path)
            self._began = self._end = path.stat().st_size
            self._reader = path.open("rb")

    def add(self, row: FileRecord) -> int:
        """Append a row and return its place."""
        place = self._end
        with saying(self.path):
            self._end += self._lines.write(row.model_dump_json(exclude_none=True))
        return place

    def older(self) -> Iterator[tuple[int, FileRecord]]:
        """Yield (place, row) of what was there at first; a line that a kill or a power cut damaged is passed over."""
        with saying(self.path, "cannot be read"), self.path.open("rb") as stream:
            while (place := stream.tell()) < self._began:
                with suppress(ValidationError):
                    yield place, _parsed(stream.readline())

    def get(self, place: int) -> FileRecord:
        """Return the row at `place`."""
        self._reader.seek(place)
        return _parsed(self._reader.readline())

    def forget(self) -> None:
        """Take the file away, because its rows are in others now; it is still read until it is closed."""
        self._is_needed = False
        with suppress(OSError):  # Windows waits until it is closed
            self.path.unlink()

    def close(self) -> None:
        """Close the file, its rows on the disk, and take it away when it is empty or not needed any more."""
        self._reader.close()
        with saying(self.path):
            self._lines.close()
            if not self._is_needed or not self._end:
                self.path.unlink(missing_ok=True)


def _parsed(line: bytes) -> FileRecord:
    return FileRecord.model_validate_json(line.strip(b"\0\r\n\t "))


@contextmanager
def scratch() -> Iterator[RowStore]:
    """Yield a store of which nothing is left after the block, nor when the process is killed in it."""
    with TemporaryDirectory(prefix="lora-harness-audit-") as folder, closing(RowStore(Path(folder, "rows"))) as store:
        store.forget()
        yield store


class Rows(Sequence[FileRecord]):
    """The rows of an audit in order, read from their store each time, with the marks of duplicates.

    `places` are those of the files, in order. `others` are places of rows of an earlier audit about files that this one
    was not asked for; they come last. `digests` and `firsts` give the digest of the file at a position, and the
    position of the first file with the same.
    """

    def __init__(self, store: RowStore, places: array[int], others: array[int]) -> None:
        self._store, self._places, self._others = store, places, others
        self.digests: Mapping[int, str | None] = {}
        self.firsts: Mapping[int, int] = {}

    def __len__(self) -> int:
        return len(self._places) + len(self._others)

    def __getitem__(self, position: Any) -> Any:
        if position >= len(self._places):
            return self._store.get(self._others[position - len(self._places)])
        row = self.unmarked(position)
        first = self.firsts.get(position)
        same = None if first is None else self.unmarked(first).path
        return row.model_copy(update={"digest": self.digests.get(position, row.digest), "duplicate_of": same})

    def unmarked(self, position: int) -> FileRecord:
        """Return the row of the file at a position as it was read."""
        return self._store.get(self._places[position])
