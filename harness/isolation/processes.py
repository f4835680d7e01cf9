"""Processes and all that they start: fork one, hear of its end, kill a whole tree of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

_SECONDS = 10.0  # a fork bomb starts processes while it is being killed
_SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER
_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def fork() -> int:
    """Fork; return the child's id, or 0 in the child."""
    with quiet_about_forks():
        return os.fork()


@contextlib.contextmanager
def quiet_about_forks() -> Iterator[None]:
    """Say nothing where Python warns because torch keeps threads; no child uses them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        yield


def can_fork(*, gpu: bool = False) -> bool:
    """Tell whether a child of this process can work: a POSIX system, and CUDA not initialised here.

    With `gpu`: whether it can use CUDA, which a child cannot where somebody has as much as asked for a device here.
    """
    torch = sys.modules.get("torch")
    if not hasattr(os, "fork") or (torch is not None and torch.cuda.is_initialized()):
        return False
    return torch is None or not gpu or not _is_refused_to_children(torch)


def _is_refused_to_children(torch: Any) -> bool:
    """Ask torch in a child whether CUDA was opened before it was forked."""
    if (pid := fork()) == 0:
        try:
            os._exit(bool(torch.cuda._is_in_bad_fork()))
        finally:  # a child that goes on would be this process once more
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def process_descriptor(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends (Linux), or None."""
    try:
        return os.pidfd_open(pid) if sys.platform == "linux" else None
    except OSError:
        return None


def waited(pid: int | str = "self") -> float:
    """Return the seconds for which a process's first thread stood in line for a processor (Linux); else 0.

    Between two readings: what of a call's time was taken by others on a busy machine.
    """
    try:
        with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # another system, or a kernel that keeps no account
        return 0.0


_adopting: list[int] = []


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends, so that `kill_tree` finds it (Linux)."""
    _control(_SUBREAPER, 1)
    _adopting[:] = [os.getpid()]


def kill_orphans() -> None:
    """Kill all that runs below this process, if it is one that adopts orphans."""
    if _adopting == [os.getpid()]:
        kill_below(os.getpid())


def die_with(parent: int, number: signal.Signals) -> None:
    """Let this process get the signal `number` when `parent`, its parent, ends (Linux)."""
    _control(_DEATH_SIGNAL, number)
    if os.getppid() != parent:  # it ended before it could be watched
        os.kill(os.getpid(), number)


def _control(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def kill_tree(pid: int) -> None:
    """Kill a process, its process group, and on Linux its descendants in other groups."""
    _send(signal.SIGSTOP, [pid])  # or it could start more while it is being killed
    kill_below(pid)
    kill_group(pid)
    _send(signal.SIGKILL, [pid])


def kill_below(pid: int) -> None:
    """Kill all processes below `pid`, and again those that they started meanwhile, until there are none."""
    deadline = time.monotonic() + _SECONDS
    while (family := descendants(pid)) and time.monotonic() < deadline:
        _send(signal.SIGSTOP, family)
        _send(signal.SIGKILL, family)
        time.sleep(0.002)  # dying takes a moment


def free_from_tracer(pid: int) -> None:
    """Kill the process below `pid` that traces it and holds it still (Linux); a debugger is no process below it."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        told = dict(line.split(":", 1) for line in file if ":" in line)
        tracer = int(told.get("TracerPid", "0"))
        if tracer and told["State"].strip().startswith("t") and tracer in descendants(pid):
            _send(signal.SIGKILL, [tracer])


def kill_group(pid: int) -> None:
    """Kill what is left of the process group that `pid` leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Return the ids of all living processes below `pid`, as /proc tells them; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    dead: set[int] = set()
    with contextlib.suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]  # the name before may hold blanks, brackets
                children.setdefault(int(parent), []).append(int(entry))
                dead |= {int(entry)} if state in "ZX" else set()
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return [member for member in found[1:] if member not in dead]
