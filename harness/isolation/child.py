"""The forked child: fence it in, run one job, say how it ended; and a kill that reaches all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from harness.errors import one_line
from harness.isolation.limits import Channel, PipeChannel


def fork() -> int:
    """Fork; return the child's id, or 0 in the child."""
    with warnings.catch_warnings():
        # Python warns because torch keeps threads; the child never uses them (it sets one thread before all else).
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        return os.fork()


def process_descriptor(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends (Linux), or None."""
    try:
        return os.pidfd_open(pid) if sys.platform == "linux" else None
    except OSError:
        return None


def kill_tree(pid: int) -> None:
    """Kill a process, its process group, and on Linux its descendants in other groups."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # or it could start more while it is being killed
    family = descendants(pid)
    kill_group(pid)
    for member in (pid, *family):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member, signal.SIGKILL)


def kill_group(pid: int) -> None:
    """Kill what is left of the process group that `pid` leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below `pid`, as /proc tells them; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])  # the name before may hold blanks and brackets
                children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found[1:]


_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc", "out of memory")


def run_child(
    job: Callable[[Channel], None], messages: int, output: int, folder: str, memory_limit: int | None
) -> NoReturn:
    """Run `job` in this freshly forked process, its messages to the descriptor `messages`, its prints to `output`.

    Temporary files go to `folder`, which the parent removes, however this process ends.
    Never returns: the parent's clean-up (atexit handlers, pytest, temporary folders) must not run twice.
    """
    owner = os.getpid()
    try:
        _fence(output)
        gc.freeze()  # every collection of garbage would look through all that the parent has imported
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        channel = PipeChannel(messages)
        if memory_limit is not None:
            _limit_memory(memory_limit)
        status, detail = _outcome(job, channel)
        if os.getpid() == owner:
            channel.finish(status, detail)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _outcome(job: Callable[[Channel], None], channel: Channel) -> tuple[str, str | None]:
    try:
        job(channel)
    except BaseException as error:
        _lift_memory_limit()  # or telling about it may fail for want of memory too
        with contextlib.suppress(BaseException):
            traceback.print_exception(error)
        return ("memory" if is_out_of_memory(error) else "raised"), one_line(error)
    return "done", None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` is Python's or torch's way of saying that memory ran out."""
    if isinstance(error, RuntimeError):
        return any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def _fence(output: int) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    _redirect(output)
    faulthandler.enable(sys.stderr)
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:  # its thread pool did not survive the fork: using it would wait for ever
        sys.modules["torch"].set_num_threads(1)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _redirect(output: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nowhere, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1, errors="replace", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="replace", closefd=False)  # type: ignore[misc]


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
