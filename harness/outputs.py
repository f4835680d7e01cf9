"""Files that hold somebody's work: replaced in one step or appended to in whole lines, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import secrets
import socket
import stat
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

from harness.errors import UserError
from harness.text import on_one_line, printable

_SYNC_SECONDS = 5.0
_MOST_UNZIPPED = 1 << 28
_POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # a file system without locks
_held: set[tuple[int, Path]] = set()  # (process, file): a forked child inherits the set and none of the locks


@contextmanager
def saying(target: Path | str, what: str = "cannot be written") -> Iterator[None]:
    """Turn the system's error inside the block into one sentence about `target`.

    Raises:
        UserError: the system refused something.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(target, 500)}: {what} ({error.strerror or error})") from None


@contextmanager
def replacing(target: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream beside `target` that takes its place at the end of the block; after an error nothing changed.

    Readers see the old file or the whole new one, with `durable` also after a power cut. The file behind a link is
    replaced and not the link; what is no regular file (a device, a pipe) is written to as it is.

    Raises:
        OSError: the system refused, for example because the disk is full.
    """
    target = Path(os.path.realpath(target))
    mode = _mode(target)
    if mode is not None and not stat.S_ISREG(mode):
        with target.open("wb") as stream:
            yield stream
        return
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        if mode is not None:
            beside.chmod(stat.S_IMODE(mode))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    if durable:
        sync_folder(target.parent)


def _mode(target: Path) -> int | None:
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return None


def replace_file(target: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` as `replacing` does."""
    with replacing(target, durable=durable) as stream:
        stream.write(content)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class LineWriter:
    """Append whole lines to a file: each is with the system at once, and on the disk after a few seconds at most.

    A last line that was cut (the process was killed, the disk was full) is ended first, so that it takes no other with
    it; a line for which there is no room is taken back.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        self._synced = time.monotonic()
        if self._is_cut():
            self._append(b"\n")

    def _is_cut(self) -> bool:
        if not self._file.seekable() or self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"

    def write(self, line: str) -> int:
        """Append `line`, which has no newline; return how many bytes there are now more."""
        raw = line.encode("utf-8", "backslashreplace") + b"\n"
        self._append(raw)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()
        return len(raw)

    def _append(self, raw: bytes) -> None:
        left = memoryview(raw)
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError:
            if written := len(raw) - len(left):
                with contextlib.suppress(OSError):
                    self._file.truncate(self._file.seek(0, os.SEEK_END) - written)
            raise

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with contextlib.suppress(OSError):  # a pipe has no disk
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file, its lines on the disk."""
        self.sync()
        self._file.close()


def text_of(path: Path) -> str:
    """Return the text of a file that a user named, unzipped if it is a `.gz`; a device may never end and is refused.

    Raises:
        OSError: it cannot be read, or becomes too large.
        UnicodeDecodeError: it is not UTF-8.
    """
    if stat.S_ISCHR(path.stat().st_mode) and os.path.realpath(path) != os.devnull:
        raise OSError(errno.EINVAL, "Is a device, a file is needed", str(path))
    return _unzipped(path).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def _unzipped(path: Path) -> bytes:
    try:
        with gzip.open(path) as stream:
            content = stream.read(_MOST_UNZIPPED + 1)
    except (EOFError, zlib.error) as error:
        raise OSError(errno.EINVAL, f"is no whole gzip file: {error}", str(path)) from None
    if len(content) > _MOST_UNZIPPED:
        raise OSError(errno.EFBIG, f"becomes more than {_MOST_UNZIPPED:,} bytes", str(path))
    return content


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of what is not empty; only a newline ends a line, NULs that a power cut left are no text.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if line := raw.strip(b"\0\r\n\t "):
                yield number, line


def damaged(path: Path, numbers: list[int], kept: str) -> str:
    """Return the sentence about lines that cannot be read: which, and what was kept."""
    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    lines = f"line {shown} is" if len(numbers) == 1 else f"{len(numbers):,} lines ({shown}) are"
    return f"{printable(path, 500)}: {lines} damaged and passed over; {kept}"


def tell(sentence: str) -> None:
    """Print a sentence that is no result on stderr."""
    print(f"note: {on_one_line(sentence)}", file=sys.stderr)


@contextmanager
def only_writer(target: Path | str, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold `target` for this process while the block runs; waits up to `seconds` for another one to let it go.

    The system lets go of it when the process ends, however it does. Where there are no such locks, none is taken.

    Raises:
        UserError: another process holds it, or its folder cannot be written.
    """
    target = Path(os.path.realpath(target))
    key = (os.getpid(), target)
    if key in _held:
        yield
        return
    with saying(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(target, time.monotonic() + seconds)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if descriptor is not None:
            _lock_file(target).unlink(missing_ok=True)
            os.close(descriptor)


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _locked(target: Path, until: float) -> int | None:
    """Return a descriptor whose lock this process has; None where the system has no locks."""
    try:
        fcntl = import_module("fcntl")
    except ImportError:
        return None
    while True:
        descriptor = os.open(_lock_file(target), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            if time.monotonic() > until:
                raise UserError(_busy(target, holder)) from None
            time.sleep(_POLL_SECONDS)
            continue
        if _is_current(descriptor, _lock_file(target)):
            _sign(descriptor)
            return descriptor
        os.close(descriptor)  # the one who had it took the file away in this moment


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        since = f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)


def _busy(target: Path, holder: str) -> str:
    who = printable(holder.strip("\0 \n"), 150) or "another process"
    return f"{printable(target, 500)}: is being written by {who}; wait for it to end, or write somewhere else"
