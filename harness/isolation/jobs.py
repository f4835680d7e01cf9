"""Run jobs in forked children, so that a subject that hangs, crashes or eats memory costs one outcome and not the run.

One thread drives all children (forking from a process that runs threads can deadlock). It reads their messages and
prints as they come, and kills a child whose call is overdue, which ends a hang in Python or in C alike.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import one_line
from harness.isolation.child import fork, is_out_of_memory, kill_group, kill_tree, process_descriptor, run_child
from harness.isolation.limits import LENGTH, Channel, LocalChannel, SubjectExitError, TimeLimitExceeded, overdue

__all__ = ["Channel", "Job", "JobEnd", "SubjectExitError", "TimeLimitExceeded", "can_fork", "run_jobs"]

Job = Callable[[Channel], None]
OnEvent = Callable[[int, object], None]
Status = Literal["done", "raised", "timeout", "killed", "memory"]

TAIL_BYTES = 4096
READ_BYTES = 1 << 16
POLL_SECONDS = 0.1  # where no descriptor tells of a process's end
SECONDS_TO_LEAVE = 5.0


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    `status`: `done`; `raised` an exception; `timeout` a call ran past its limit; `killed` the process died by itself;
    `memory` it ran out of the memory allowed. `last_label` names the last call it began, `output_tail` is the end of
    what it printed.
    """

    status: Status
    detail: str | None = None
    last_label: str | None = None
    output_tail: str = ""
    seconds: float = 0.0

    @property
    def what(self) -> str:
        """What happened to a subject whose job did not end by finishing, in one clause."""
        why = {"timeout": "call stopped at its time limit", "memory": "out of memory", "killed": "process died"}
        return f"{why.get(self.status, 'raised outside a call')}: {self.detail or self.status}"


def can_fork() -> bool:
    """Tell whether jobs can run in children here: a POSIX system, and CUDA not initialised in this process."""
    torch = sys.modules.get("torch")
    return hasattr(os, "fork") and not (torch is not None and torch.cuda.is_initialized())


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    seconds_per_call: float = 60.0,
    memory_limit: int | None = None,
    on_event: OnEvent = lambda index, event: None,
) -> list[JobEnd]:
    """Run every job, at most `workers` at a time, each in its own child; return how they ended, in the jobs' order.

    What a job sends goes to `on_event(index of the job, object)` in this process at once. `seconds_per_call` limits
    each block under `channel.call(label)` that names no limit of its own, `memory_limit` is in bytes over what this
    process uses. With `workers=0`, or where `can_fork()` is False, the jobs run here one after the other: a limit then
    interrupts Python code only.
    An exception of `on_event`, or Ctrl-C, kills the children and goes on.
    """
    if workers < 1 or not can_fork():
        return [_run_here(job, index, seconds_per_call, on_event) for index, job in enumerate(jobs)]
    with _Children(seconds_per_call, memory_limit, on_event) as children:
        waiting = deque(enumerate(jobs))
        while waiting or children.running:
            while waiting and len(children.running) < workers:
                children.start(*waiting.popleft())
            children.attend()
    return [children.ends[index] for index in range(len(jobs))]


def _run_here(job: Job, index: int, seconds: float, on_event: OnEvent) -> JobEnd:
    channel = LocalChannel(seconds, lambda event: on_event(index, event))
    began = time.monotonic()
    status: Status = "done"
    detail = None
    try:
        job(channel)
    except TimeLimitExceeded as error:
        status, detail = "timeout", str(error)
    except (Exception, SystemExit) as error:
        if error is channel.unheard:
            raise
        status, detail = ("memory" if is_out_of_memory(error) else "raised"), one_line(error)
    return JobEnd(status, detail, channel.label if status != "done" else None, "", time.monotonic() - began)


@dataclass
class _Child:
    index: int
    pid: int
    folder: str
    messages: int
    output: int
    death: int | None  # a descriptor that tells of the process's end, where the system has such
    began: float
    label: str | None = None
    seconds: float = 0.0  # that the call `label` may take
    deadline: float | None = None
    unread: bytearray = field(default_factory=bytearray)
    tail: bytes = b""
    end: tuple[Status, str | None] | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.messages, self.output) if self.death is None else (self.messages, self.output, self.death)


class _Children:
    """The children that run now: start them, read what they say, end the ones that are over or overdue."""

    def __init__(self, seconds: float, memory_limit: int | None, on_event: OnEvent) -> None:
        self.running: list[_Child] = []
        self.ends: dict[int, JobEnd] = {}
        self._seconds, self._memory_limit, self._on_event = seconds, memory_limit, on_event
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.running:
            kill_tree(child.pid)
            os.waitpid(child.pid, 0)
            self._close(child)
        self.running.clear()
        self._selector.close()

    def start(self, index: int, job: Job) -> None:
        messages, messages_end = os.pipe()
        output, output_end = os.pipe()
        folder = tempfile.mkdtemp(prefix="lora-harness-job-")
        pid = fork()
        if pid == 0:
            run_child(job, messages_end, output_end, folder, self._memory_limit)
        os.close(messages_end)
        os.close(output_end)
        with contextlib.suppress(OSError):  # the child does the same; whoever comes first
            os.setpgid(pid, pid)
        child = _Child(index, pid, folder, messages, output, process_descriptor(pid), time.monotonic())
        self.running.append(child)
        os.set_blocking(messages, False)
        os.set_blocking(output, False)
        for descriptor, read in zip(child.descriptors, (self._read_messages, _read_output, _read_death), strict=False):
            self._selector.register(descriptor, selectors.EVENT_READ, (read, child))

    def attend(self) -> None:
        """Wait for something to happen, then deal with all that did."""
        for key, _ in self._selector.select(self._patience()):
            read, child = key.data
            if not read(child):
                self._selector.unregister(key.fd)
        for child in list(self.running):
            if _is_late(child):
                self._read_messages(child)  # the answer may lie there unread when this process was busy
            if _is_late(child):
                child.end = child.end or ("timeout", overdue(child.label, child.seconds))
                kill_tree(child.pid)
            self._bury_if_dead(child)

    def _patience(self) -> float:
        now = time.monotonic()
        return max(0.0, min([POLL_SECONDS, *(child.deadline - now for child in self.running if child.deadline)]))

    def _read_messages(self, child: _Child) -> bool:
        while chunk := _read(child.messages):
            child.unread += chunk
            for message in _frames(child.unread):
                self._take(child, message)
        return chunk is None

    def _take(self, child: _Child, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "event":
            self._on_event(child.index, rest[0])
        elif kind == "start":
            child.label, began, seconds = rest
            child.seconds = seconds or self._seconds
            child.deadline = began + child.seconds
        elif kind == "end":
            child.deadline = None
        else:
            child.end, child.deadline = (rest[0], rest[1]), time.monotonic() + SECONDS_TO_LEAVE

    def _bury_if_dead(self, child: _Child) -> None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid == 0:
            return
        kill_group(child.pid)  # what the subject started and left behind
        self.running.remove(child)
        self._read_messages(child)
        _read_output(child)
        self._close(child)
        tail = child.tail.decode(errors="replace").strip()
        how, detail = child.end or _death(os.waitstatus_to_exitcode(status), child, tail)
        self.ends[child.index] = JobEnd(how, detail, child.label, tail, time.monotonic() - child.began)

    def _close(self, child: _Child) -> None:
        for descriptor in child.descriptors:
            with contextlib.suppress(KeyError):
                self._selector.unregister(descriptor)
            os.close(descriptor)
        shutil.rmtree(child.folder, ignore_errors=True)


def _read_death(child: _Child) -> bool:
    return False  # nothing to read: being ready is the message


def _is_late(child: _Child) -> bool:
    return child.deadline is not None and time.monotonic() > child.deadline


def _death(code: int, child: _Child, tail: str) -> tuple[Status, str]:
    """Say how a child ended that could not say so itself."""
    inside = f" in {child.label}" if child.deadline is not None else ""
    if code == -signal.SIGABRT and "bad_alloc" in tail:
        return "memory", f"ran out of memory{inside}"
    if code < 0:
        return "killed", f"killed by {signal.Signals(-code).name}{inside}"
    return "killed", f"the process ended with exit status {code}{inside}"


def _read(descriptor: int) -> bytes | None:
    """Return what is there to read, b"" at the end, None when there is nothing now."""
    try:
        return os.read(descriptor, READ_BYTES)
    except BlockingIOError:
        return None


def _frames(unread: bytearray) -> Iterator[tuple[Any, ...]]:
    """Take the complete messages out of `unread`."""
    while len(unread) >= LENGTH.size:
        (length,) = LENGTH.unpack_from(unread)
        if len(unread) < LENGTH.size + length:
            return
        body = bytes(unread[LENGTH.size : LENGTH.size + length])
        del unread[: LENGTH.size + length]
        yield pickle.loads(body)


def _read_output(child: _Child) -> bool:
    for _ in range(64):  # at most 4 MiB at once: a child that prints for ever must not keep the others waiting
        chunk = _read(child.output)
        if not chunk:
            return chunk is None
        child.tail = (child.tail + chunk)[-TAIL_BYTES:]
    return True
