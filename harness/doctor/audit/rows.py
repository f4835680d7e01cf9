"""One file of an audit as one row: what `inspect` says, when it was read, and what tells it from other files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from harness.doctor.audit import remote
from harness.doctor.inspect.describe import read_record, unreadable
from harness.errors import UserError
from harness.files import TensorFile
from harness.files.read import open_source
from harness.verdict.file_record import FileRecord

_SAMPLE_BYTES = 4096
_CHUNK_BYTES = 1 << 20


def audit_file(path: str, *, energy: bool = False) -> FileRecord:
    """Return the row of one local file, PEFT folder or URL; whatever is wrong with it is in the row."""
    began = time.perf_counter()
    try:
        if remote.is_url(path):
            with remote.local_copy(path) as copy:
                record, mark = read_record(copy)[0].model_copy(update={"path": path}), None
        else:
            record, adapter = read_record(path, energy=energy)
            mark = fingerprint(adapter.file) if adapter else None
    except UserError as error:
        return unreadable(path, str(error))
    told: dict[str, object] = {
        "seconds": round(time.perf_counter() - began, 4),
        "fingerprint": mark,
        "unprescribed": {},
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
    header = ["\n".join(names), " ".join([info.dtype for info in infos]), listed]
    total.update("\0".join(header).encode("utf-8", "surrogatepass"))
    for block in _blocks(file, read, limit):
        total.update(block)
    return total.hexdigest()


def _blocks(file: TensorFile, names: Iterable[str], limit: int | None) -> Iterator[bytes]:
    with file.path.open("rb", buffering=0) as stream:
        for name in names:
            info = file.tensors[name]
            left = min(info.end - info.start, limit or info.end)
            stream.seek(info.start)
            while left > 0 and (block := stream.read(min(left, _CHUNK_BYTES))):
                left -= len(block)
                yield block
