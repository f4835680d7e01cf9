"""The forked child: fenced in, doing one thing, saying how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from harness.errors import one_line
from harness.garbage import SELDOM, USUAL
from harness.isolation import frames
from harness.isolation.gpus import hide_gpus, show_gpus
from harness.isolation.processes import adopt_orphans, die_with, kill_orphans

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc", "out of memory")
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000  # unshare's CLONE_NEWNS and CLONE_NEWUSER
_PRIVATE = 0x4000 | 0x40000  # mount's MS_REC | MS_PRIVATE


@dataclass(frozen=True)
class Ends:
    """A child's ends of its pipes: `orders` to read from, `messages` and `output` to write to; its own `folder`."""

    orders: int
    messages: int
    output: int
    folder: str
    parent: int

    def say(self, message: Any) -> None:
        """Send a message to the parent."""
        frames.write(self.messages, message)


def run_child(
    work: Callable[[Ends], None], ends: Ends, *, trusted: bool, memory_limit: int | None, gpu: bool = False
) -> NoReturn:
    """Do `work` in this freshly forked process, say how it ended and leave.

    Temporary files go to the folder of `ends`, which the parent removes, however this process ends. One that is
    `trusted`, since no foreign code runs in it, answers for all that is started below it. The other has no pipe or
    socket of its parent's left, and on Linux a /dev/shm of its own where the system allows that. Without `gpu` it finds
    none.
    Never returns: the parent's clean-up (atexit handlers, pytest, temporary folders) must not run twice.
    """
    with _leaving():
        _fence(ends, trusted)
        show_gpus() if gpu else hide_gpus()
        gc.freeze()  # every collection of garbage would look through all that the parent has imported
        gc.set_threshold(*(SELDOM if trusted else USUAL))  # foreign code may count on when its objects go
        tempfile.tempdir = os.environ["TMPDIR"] = ends.folder
        if memory_limit is not None:
            _limit_memory(memory_limit)
        _do(work, ends)
    raise AssertionError("it has left")


def go_on(work: Callable[[Ends], None], ends: Ends) -> NoReturn:
    """Do `work` in a fenced process that went on as another interpreter, say how it ended and leave."""
    with _leaving():
        _do(work, ends)
    raise AssertionError("it has left")


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        kill_orphans()
        os._exit(0)


def _do(work: Callable[[Ends], None], ends: Ends) -> None:
    owner = os.getpid()
    how = _outcome(work, ends)
    if os.getpid() == owner:
        ends.say(how)


def _outcome(work: Callable[[Ends], None], ends: Ends) -> dict[str, str | None]:
    try:
        work(ends)
    except BaseException as error:
        _lift_memory_limit()  # or telling about it may fail for want of memory too
        with contextlib.suppress(BaseException):
            traceback.print_exception(error)
        return {"finish": "memory" if is_out_of_memory(error) else "raised", "detail": one_line(error)}
    return {"finish": "done", "detail": None}


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` is Python's or torch's way of saying that memory ran out."""
    if isinstance(error, RuntimeError):
        return any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def _fence(ends: Ends, trusted: bool) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    if trusted:
        adopt_orphans()
        signal.signal(signal.SIGTERM, _leaver(ends.folder))
    die_with(ends.parent, signal.SIGTERM if trusted else signal.SIGKILL)
    _redirect(ends.output)
    if not trusted:
        _close_all_but(ends)
        _own_shared_memory()
    faulthandler.enable(sys.stderr)
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:  # its thread pool did not survive the fork: using it would wait for ever
        sys.modules["torch"].set_num_threads(1)


def _leaver(folder: str) -> Callable[[int, FrameType | None], NoReturn]:
    def leave(number: int, frame: FrameType | None) -> NoReturn:
        """Leave nothing behind when the run is killed."""
        kill_orphans()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    return leave


def _redirect(output: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nowhere, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1, errors="replace", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="replace", closefd=False)  # type: ignore[misc]


def _close_all_but(ends: Ends) -> None:
    """Close the pipes and sockets that this process was born with: what others read there is not its to write."""
    for descriptor in range(3, os.sysconf("SC_OPEN_MAX") if not os.path.isdir("/dev/fd") else 0):
        _close_if_pipe(descriptor, ends)
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        _close_if_pipe(int(name), ends)


def _close_if_pipe(descriptor: int, ends: Ends) -> None:
    if descriptor < 3 or descriptor in (ends.orders, ends.messages):
        return
    with contextlib.suppress(OSError):
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            os.close(descriptor)


def _own_shared_memory() -> None:
    """Mount a /dev/shm that goes when this process and its children are gone, where the system lets us (Linux)."""
    if sys.platform != "linux" or not os.path.isdir("/dev/shm"):
        return
    libc, uid, gid = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS if uid == 0 else _NEW_MOUNTS | _NEW_USER) != 0:
        return
    with contextlib.suppress(OSError):
        for name, text in (
            () if uid == 0 else (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"))
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    if libc.mount(b"none", b"/", None, _PRIVATE, None) == 0:
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)


def _limit_memory(extra: int) -> None:
    """Let the address space grow by `extra` bytes over what the parent had."""
    import resource

    with contextlib.suppress(OSError, ValueError):  # no /proc, or a system that refuses this limit
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = pages * os.sysconf("SC_PAGE_SIZE") + extra
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _lift_memory_limit() -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
