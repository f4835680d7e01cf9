"""Start and end processes: a fork that does not warn, and a kill that reaches everything a process started."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings


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
