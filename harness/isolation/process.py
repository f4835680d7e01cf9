"""A forked child as its parent sees it: give it orders, take its messages, keep the end of its prints, end it."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from harness.isolation import frames
from harness.isolation.child import Ends, run_child
from harness.isolation.frames import FrameError, Frames
from harness.isolation.processes import fork, free_from_tracer, kill_group, kill_tree, process_descriptor

Status = Literal["done", "raised", "timeout", "killed", "memory"]
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes: somebody, or want of memory; no accident of its own
TAIL_BYTES = 4096
READ_BYTES = 1 << 16
POLL_SECONDS = 0.1  # where no descriptor tells of a process's end
_FOLDER = "lora-harness-job-held-"  # releases that held no lock on their folders named them otherwise
_YOUNG_SECONDS = 60.0  # a folder may be there a moment before its lock
_CHUNKS = 64  # at most 4 MiB at once: a child that prints for ever must not keep the others waiting


class Process:
    """A child that does `work`; `ended` is how it ended by its own account, or by ours once that is known."""

    def __init__(
        self, work: Callable[[Ends], None], *, trusted: bool, memory_limit: int | None = None, gpu: bool = False
    ) -> None:
        orders_end, self._orders = os.pipe()
        self._messages, messages_end = os.pipe()
        self._output, output_end = os.pipe()
        remove_left_folders(tempfile.gettempdir())
        self.folder = tempfile.mkdtemp(prefix=_FOLDER)
        self._held = _hold(self.folder)
        parent, self.pid = os.getpid(), fork()
        if self.pid == 0:
            for mine in (self._orders, self._messages, self._output):
                os.close(mine)
            ends = Ends(orders_end, messages_end, output_end, self.folder, parent)
            run_child(work, ends, trusted=trusted, memory_limit=memory_limit, gpu=gpu)
        for theirs in (orders_end, messages_end, output_end):
            os.close(theirs)
        with contextlib.suppress(OSError):  # the child does the same; whoever comes first
            os.setpgid(self.pid, self.pid)
        self._death = process_descriptor(self.pid)
        for descriptor in (self._messages, self._output):
            os.set_blocking(descriptor, False)
        self.began, self._trusted = time.monotonic(), trusted
        self.ended: tuple[Status, str | None] | None = None
        self._frames, self._tail = Frames(), b""
        self._code: int | None = None
        self._open = {self._messages, self._output}  # until the other end is closed

    def descriptors(self) -> Iterator[int]:
        """Yield what becomes readable when there is something to take: messages, prints, its end where that shows."""
        yield from self._open
        if self._death is not None:
            yield self._death

    def order(self, message: Any) -> None:
        """Send it a message.

        Raises:
            OSError: it does not read any more.
        """
        frames.write(self._orders, message)

    def take(self) -> Iterator[Any]:
        """Yield the messages that are there, and read what it printed.

        Raises:
            FrameError: what it sent is no message.
        """
        self._read_output()
        while chunk := self._read(self._messages):
            for message in self._frames.feed(chunk):
                if isinstance(message, dict) and "finish" in message:
                    self.ended = _end(message)
                else:
                    yield message

    def _read_output(self) -> None:
        for _ in range(_CHUNKS):
            chunk = self._read(self._output)
            if not chunk:
                return
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]

    def _read(self, descriptor: int) -> bytes | None:
        """Return what is there to read; nothing at the end, and when there is nothing now."""
        try:
            chunk = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return None
        if not chunk:
            self._open.discard(descriptor)
        return chunk

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        self._read_output()
        return self._tail.decode(errors="replace").strip()

    def exit_code(self) -> int | None:
        """Return its exit status (negative: the signal that killed it) once it is over."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                pid = self._go_on()
            elif pid == 0 and self._trusted:
                free_from_tracer(self.pid)
            self._code = None if pid == 0 else os.waitstatus_to_exitcode(status)
        return self._code

    def _go_on(self) -> int:
        """Let a trusted process that somebody stopped, such as a subject below it, go on; another one is late soon."""
        if self._trusted:
            os.kill(self.pid, signal.SIGCONT)
        return 0

    def death(self, code: int) -> tuple[Status, str]:
        """Say how it ended when it could not say so itself."""
        if code == -signal.SIGABRT and "bad_alloc" in self.tail:
            return "memory", "ran out of memory"
        if code < 0:
            return "killed", f"killed by {signal.Signals(-code).name}"
        return "killed", f"the process ended with exit status {code}"

    def kill(self) -> None:
        """Kill it and all that it started; returns when it is over."""
        if self._code is None:
            kill_tree(self.pid)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Let go of a process that is over: of what it left behind in its group, its pipes and its folder."""
        kill_group(self.pid)
        shutil.rmtree(self.folder, ignore_errors=True)
        for descriptor in (self._orders, self._messages, self._output, self._death, self._held):
            if descriptor is not None:
                os.close(descriptor)


@cache
def remove_left_folders(root: str) -> None:
    """Remove the folders of runs that were killed with all their processes; once in this process."""
    for folder in Path(root).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _YOUNG_SECONDS:
                _remove_unheld(folder)


def _remove_unheld(folder: Path) -> None:
    held = _hold(folder)
    if held is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _hold(folder: Path | str) -> int | None:
    """Return a descriptor that locks a folder until this process and all that it forks have ended or closed it.

    None where another process holds it, or where there are no such locks. Process ids would not do: containers that
    share a folder count them each for itself.
    """
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl = import_module("fcntl")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _end(message: dict[str, Any]) -> tuple[Status, str | None]:
    status, detail = message["finish"], message.get("detail")
    if status not in get_args(Status) or not isinstance(detail, str | None):
        raise FrameError("a message about an end that is none")
    return status, detail


def wait_for(processes: Iterable[Process], seconds: float) -> None:
    """Return when one of the processes has something to take or is over, at the latest after `seconds`."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            for descriptor in process.descriptors():
                selector.register(descriptor, selectors.EVENT_READ)
        selector.select(max(0.0, min(seconds, POLL_SECONDS)))
