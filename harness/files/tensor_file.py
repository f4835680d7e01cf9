"""An opened file of named tensors, whatever its container: the header first, tensors when asked for."""

from __future__ import annotations

import errno
import math
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from harness.errors import LoraFileError
from harness.files.keys import Spelling
from harness.text import printable

if TYPE_CHECKING:
    import torch

MAX_TENSORS = 100_000
_GAP_BYTES = 1 << 12  # reading so much more costs no more than another call
_RUN_BYTES = 1 << 20
CUT = "the file is shorter than it was"
_CODES = {
    "F64": "d", "F32": "f", "F16": "e",
    "I64": "q", "I32": "i", "I16": "h", "I8": "b",
    "U64": "Q", "U32": "I", "U16": "H", "U8": "B",
}  # fmt: skip
_STRUCT = {dtype: struct.Struct(f"<{code}") for dtype, code in _CODES.items()}
_HALVES = {"BF16": "<f", "F8_E5M2": "<e"}  # the upper half of a float of this code
_BITS = {  # bytes of an element, and its bits without the sign from which on it is not finite
    "F64": (8, 0x7FF << 52), "F32": (4, 0xFF << 23), "F16": (2, 0x7C00), "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C), "F8_E4M3": (1, 0x7F),
}  # fmt: skip
_BUFFER_BYTES = 1 << 20
_FLOATS = frozenset({"F64", "F32", "F16", *_HALVES, "F8_E4M3"})


class TensorInfo(NamedTuple):
    """What the header says of one tensor; `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """The number of elements (1 for a scalar)."""
        return math.prod(self.shape)


class Extent(NamedTuple):
    """How large the elements of a tensor are: the largest absolute value, infinite where one is not finite."""

    largest: float
    finite: bool


@dataclass(frozen=True)
class TensorFile:
    """The validated header of one file; tensors are read when asked for.

    `tensors` keeps the order of the data in the file, which is the order in which loaders see the keys.
    `duplicates` are names that the header has twice: safetensors takes the last, other parsers may take the first.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int
    duplicates: tuple[str, ...] = ()
    _opened: list[Any] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The tensor names, in file order."""
        return tuple(self.tensors)

    @cached_property
    def text(self) -> str:
        """All names, a line each: one look says that no name has a word in it."""
        return "\n".join(self.keys)

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self.keys, self.text)

    @property
    def is_plain(self) -> bool:
        """Tell whether the tables write all its names as they are."""
        return not self._spelling.changes

    @property
    def plain(self) -> Callable[[str], str]:
        """Give a name as the tables write it, without what wrappers (`torch.compile`, FSDP, DDP) put into it."""
        return self._spelling.plain

    @property
    def wrappers(self) -> dict[str, list[str]]:
        """The wrappers that are left out, with the names that have them."""
        return self._spelling.wrappers(self.keys)

    def numbers(self, keys: Iterable[str]) -> dict[str, float]:
        """Read tensors of one number (`scalar_problem` says which are) as Python floats, without torch.

        Raises:
            LoraFileError: the file changed.
        """
        ordered = sorted((self.tensors[key].start, key) for key in keys)
        if not ordered:
            return {}
        try:
            with self.path.open("rb", buffering=0) as stream:
                return {key: value for run in self._runs(ordered) for key, value in self._numbers(stream, run)}
        except OSError as error:
            raise LoraFileError(self.path, os_problem(error)) from error

    def _runs(self, ordered: Iterable[tuple[int, str]]) -> Iterator[list[str]]:
        """Yield keys, given in the order of the data, in runs that are worth one read."""
        run: list[str] = []
        first = last = 0
        for start, key in ordered:
            if run and (start > last + _GAP_BYTES or start > first + _RUN_BYTES):
                yield run
                run = []
            first = start if not run else first
            last = self.tensors[key].end
            run.append(key)
        if run:
            yield run

    def _numbers(self, stream: FileIO, run: Sequence[str]) -> Iterator[tuple[str, float]]:
        first = self.tensors[run[0]].start
        stream.seek(first)
        raw = stream.read(self.tensors[run[-1]].end - first)
        if len(raw) < self.tensors[run[-1]].end - first:
            raise LoraFileError(self.path, f"cannot be read ({CUT})", key=printable(run[-1]))
        for key in run:
            dtype, _, start, end = self.tensors[key]
            yield key, decoded(dtype, raw[start - first : end - first])

    def extents(self, keys: Iterable[str]) -> dict[str, Extent]:
        """Read tensors of floats, each once, and say how large their elements are; other dtypes are left out.

        Works on the bits, in a buffer of a few megabytes: nothing is converted or kept.

        Raises:
            LoraFileError: the file cannot be read, or is shorter than its header says.
        """
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        able = sorted((self.tensors[key].start, key) for key in keys if self.tensors[key].dtype in _BITS)
        try:
            with self.path.open("rb", buffering=0) as stream:
                return {key: self._extent(stream, self.tensors[key], buffer) for _, key in able}
        except OSError as error:
            raise LoraFileError(self.path, os_problem(error)) from error

    def _extent(self, stream: FileIO, info: TensorInfo, buffer: memoryview) -> Extent:
        import numpy as np

        code, infinite = _BITS[info.dtype]
        unsigned, signed = np.dtype(f"<u{code}"), np.dtype(f"<i{code}")
        largest, left = 0, info.end - info.start
        stream.seek(info.start)
        while left > 0:
            got = stream.readinto(buffer[: min(left, len(buffer))])
            if not got or got % code:
                raise LoraFileError(self.path, "is shorter than its header says")
            bits = np.frombuffer(buffer[:got], unsigned)
            positive, negative = int(bits.view(signed).max()), int(bits.max())  # by size, both begin with their sign
            largest = max(largest, positive, negative & (1 << 8 * code - 1) - 1)
            left -= got
        finite = largest < infinite
        value = decoded(info.dtype, largest.to_bytes(code, "little")) if finite else math.inf
        return Extent(value, finite)

    def tensor(self, key: str) -> torch.Tensor:
        """Return one tensor as stored (dtype, shape); needs torch."""
        raise NotImplementedError

    def elements(self, start: int, count: int, kind: torch.dtype, room: torch.Tensor | None = None) -> torch.Tensor:
        """Return `count` numbers that begin at byte `start`, as one dimension; in `room`, bytes enough, if given.

        They are read and never mapped: a mapped file that somebody cuts meanwhile ends the process by a signal.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is shorter than it was.
        """
        import torch

        size = count * kind.itemsize
        raw = torch.empty(size, dtype=torch.uint8) if room is None else room[:size]
        view, at = raw.numpy().data, 0
        while at < len(view) and (got := _read_into(self._stream(), view[at:], start + at)):
            at += got
        if at < len(view):
            raise ValueError(CUT)
        return raw.view(kind)

    def _stream(self) -> FileIO:
        """Return the file, which stays open: another may take its place."""
        if not self._opened:
            self._opened.append(self.path.open("rb", buffering=0))
            if hasattr(os, "posix_fadvise"):  # else a few rows bring in megabytes around them
                os.posix_fadvise(self._opened[0].fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        stream: FileIO = self._opened[0]
        return stream

    def __del__(self) -> None:
        for stream in self._opened:
            stream.close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind when sent to another process."""
        return {**self.__dict__, "_opened": []}


@contextmanager
def set_apart(path: Path, head: bytes, size: int) -> Iterator[IO[bytes]]:
    """Yield a file of `size` bytes that begins as `path` does, with `head`, to be mapped: nobody else can cut it.

    The rest is a hole, so that it takes no more room than its head. Where this process may write nothing it is the file
    itself.

    Raises:
        OSError: the file cannot be read.
    """
    memory = hasattr(os, "memfd_create")
    with FileIO(os.memfd_create("header"), "w+") if memory else tempfile.TemporaryFile() as stream:
        try:
            stream.write(head)
            stream.truncate(size)
        except OSError:
            with path.open("rb", buffering=0) as itself:
                yield itself
        else:
            yield stream


def _read_into(stream: FileIO, view: memoryview, at: int) -> int:
    """Read at a place, where the system can without moving the position that threads would share."""
    if hasattr(os, "preadv"):
        return os.preadv(stream.fileno(), [view], at)
    stream.seek(at)
    return stream.readinto(view) or 0


def regular_size(path: Path) -> int:
    """Return the size of a regular file.

    Raises:
        LoraFileError: missing, a folder, a pipe or a device.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise LoraFileError(path, os_problem(error)) from error
    except ValueError as error:
        raise LoraFileError(printable(path), f"is no usable path ({printable(error)})") from error
    if stat.S_ISDIR(status.st_mode):
        raise LoraFileError(path, "is a folder, not a file of tensors")
    if not stat.S_ISREG(status.st_mode):
        raise LoraFileError(path, "is not a regular file")
    return status.st_size


def os_problem(error: OSError) -> str:
    """Say in one clause why the system refused to open something."""
    known = {
        errno.ENOENT: "no such file or folder",
        errno.ELOOP: "symbolic links that lead back to themselves",
        errno.EACCES: "permission denied",
        errno.ENOTDIR: "no such file: a part of the path is not a folder",
    }
    return known.get(error.errno or 0, f"cannot be read ({error.strerror or error})")


def is_float(dtype: str) -> bool:
    """Tell whether a tensor of this dtype holds weights; `Q8_0` and its like are ggml's quantised floats."""
    return dtype in _FLOATS or dtype.startswith(("Q", "IQ", "TQ"))


def scalar_problem(dtype: str, elements: int) -> str | None:
    """Say why a tensor holds no single number, or None when it does."""
    if elements != 1:
        return f"has {elements} elements, one number is needed"
    if dtype not in _FLOATS and dtype not in _STRUCT:
        return f"has dtype {dtype}, a number is needed"
    return None


def decoded(dtype: str, raw: bytes) -> float:
    """Return the little-endian number in `raw`; `scalar_problem` said that `dtype` holds one."""
    if dtype in _STRUCT:
        return float(_STRUCT[dtype].unpack(raw)[0])
    if dtype in _HALVES:
        return float(struct.unpack(_HALVES[dtype], bytes(len(raw)) + raw)[0])
    return _e4m3(raw[0])


def _e4m3(byte: int) -> float:
    """Return a float of 4 exponent bits (bias 7) and 3 of mantissa, without infinities, all ones for NaN."""
    exponent, mantissa = divmod(byte & 0x7F, 8)
    if (exponent, mantissa) == (15, 7):
        return math.nan
    value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -value if byte & 0x80 else value
