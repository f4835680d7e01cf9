"""Run jobs in forked children of this process, so that one that hangs, crashes or eats memory costs its own outcome.

One thread drives all children (forking from a process that runs threads can deadlock). It reads their messages and
prints as they come, and kills a child whose call is overdue, that is silent or that has used up its time.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from harness.errors import UserError, one_line
from harness.isolation.child import Ends, is_out_of_memory
from harness.isolation.frames import FrameError, unwrapped, wrapped
from harness.isolation.limits import Channel, LocalChannel, SubjectExitError, TimeLimitExceeded, overdue
from harness.isolation.process import FROM_OUTSIDE, POLL_SECONDS, Process, Status, wait_for
from harness.isolation.processes import can_fork

__all__ = ["Channel", "Job", "JobEnd", "SubjectExitError", "TimeLimitExceeded", "can_fork", "run_jobs"]

Job = Callable[[Channel], None]
OnEvent = Callable[[int, Any], None]

SECONDS_TO_LEAVE = 5.0
_NO_ROOM = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE") if hasattr(errno, name)]
_OF_THE_MACHINE = re.compile(rf"\[Errno ({'|'.join(map(str, _NO_ROOM))})\]")


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    `status`: `done`; `raised` an exception; `timeout` a call, or the job, ran past its limit; `killed` the process died
    by itself; `memory` it ran out of the memory allowed. `last_label` names the last call it began, `output_tail` is
    the end of what it printed, `exit_code` the process's status (negative: the signal that ended it).
    """

    status: Status
    detail: str | None = None
    last_label: str | None = None
    output_tail: str = ""
    seconds: float = 0.0
    exit_code: int | None = None

    @property
    def from_outside(self) -> bool:
        """Whether a signal ended it that no process sends itself by accident: from somebody, or for want of memory."""
        return self.status == "killed" and self.exit_code in FROM_OUTSIDE

    @property
    def trouble(self) -> UserError | None:
        """What the machine had no room for outside the subject's calls, such as a file on a full disk; None if nothing.

        Nothing is known of the subject then.
        """
        found = self.status == "raised" and _OF_THE_MACHINE.search(self.detail or "")
        return UserError(f"{self.detail}: nothing is known of what was being measured") if found else None

    @property
    def what(self) -> str:
        """What happened to a subject whose job did not end by finishing, in one clause."""
        why = {"timeout": "call stopped at its time limit", "memory": "out of memory", "killed": "process died"}
        return f"{why.get(self.status, 'raised outside a call')}: {self.detail or self.status}"


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    seconds_per_call: float = 60.0,
    silence: float | None = None,
    budget: float | None = None,
    memory_limit: int | None = None,
    on_event: OnEvent = lambda index, event: None,
) -> list[JobEnd]:
    """Run every job, at most `workers` at a time, each in its own child; return how they ended, in the jobs' order.

    What a job sends, JSON with tensors under the key `tensors` of a dictionary, goes to `on_event(index of the job,
    message)` in this process at once. `seconds_per_call` limits each block under `channel.call(label)` that names no
    limit of its own, `silence` the seconds without a message outside such blocks, `budget` those of a whole job;
    `memory_limit` is in bytes over what this process uses. With `workers=0`, or where `can_fork()` is False, the jobs
    run here one after the other: a limit then interrupts Python code only.
    An exception of `on_event`, or Ctrl-C, kills the children and goes on.
    """
    if workers < 1 or not can_fork():
        return [_run_here(job, index, seconds_per_call, on_event) for index, job in enumerate(jobs)]
    with _Children(_Times(seconds_per_call, silence, budget), memory_limit, on_event) as children:
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


class PipeChannel(Channel):
    """The child's end of a job."""

    # A child is in no terminal's foreground group, so only the subject can raise KeyboardInterrupt in it.
    _exits = (SystemExit, GeneratorExit, KeyboardInterrupt)

    def __init__(self, ends: Ends) -> None:
        self._ends, self._owner = ends, os.getpid()

    def send(self, event: Any) -> None:
        """Send one event; TypeError when it is neither JSON nor has tensors under `tensors`."""
        self._say(wrapped("event", event))

    @contextmanager
    def _watched(self, label: str, seconds: float | None) -> Iterator[None]:
        self._say({"start": label, "at": time.monotonic(), "seconds": seconds})
        try:
            yield
        finally:
            self._say({"stop": label})

    def _say(self, message: dict[str, Any]) -> None:
        if os.getpid() == self._owner:  # else a process that was forked in a call, running on in a copy of the job
            self._ends.say(message)


@dataclass(frozen=True)
class _Times:
    """Seconds: of a call that names none, without a message outside calls, of a whole job."""

    call: float
    silence: float | None
    budget: float | None


@dataclass
class _Child:
    index: int
    process: Process
    times: _Times
    label: str | None = None
    allowed: float = 0.0  # for the call `label`
    inside: bool = False
    overdue_at: float | None = None
    late: str | None = None
    heard: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float | None:
        """When it will have to be ended, if nothing comes before."""
        budget, silence = self.times.budget, self.times.silence
        whole = self.process.began + budget if budget else None
        quiet = self.heard + silence if silence and not self.inside else None
        return min((at for at in (self.overdue_at, whole, quiet) if at is not None), default=None)

    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def excess(self) -> str:
        """Say which of its limits it passed."""
        now, budget = time.monotonic(), self.times.budget
        if self.overdue_at is not None and now > self.overdue_at:
            return overdue(self.label, self.allowed)
        if budget and now > self.process.began + budget:
            return f"not done within its budget of {budget:g} s"
        return f"no sign of life for {self.times.silence:g} s"

    def take(self, message: Any) -> None:
        self.heard = time.monotonic()
        if "start" in message:
            self.label, self.allowed = message["start"], message["seconds"] or self.times.call
            self.inside, self.overdue_at = True, message["at"] + self.allowed
        elif "stop" in message:
            self.inside, self.overdue_at = False, None


class _Children:
    """The children that run now: start them, read what they say, end the ones that are over or overdue."""

    def __init__(self, times: _Times, memory_limit: int | None, on_event: OnEvent) -> None:
        self.running: list[_Child] = []
        self.ends: dict[int, JobEnd] = {}
        self._times, self._memory_limit, self._on_event = times, memory_limit, on_event

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.running:
            child.process.kill()
            child.process.close()
        self.running.clear()

    def start(self, index: int, job: Job) -> None:
        process = Process(lambda ends: job(PipeChannel(ends)), trusted=True, memory_limit=self._memory_limit)
        self.running.append(_Child(index, process, self._times))

    def attend(self) -> None:
        """Wait for something to happen, then deal with all that did."""
        now = time.monotonic()
        deadlines = (child.deadline for child in self.running)
        patience = min((at - now for at in deadlines if at is not None), default=POLL_SECONDS)
        wait_for([child.process for child in self.running], patience)
        for child in list(self.running):
            self._read(child)
            if child.is_late():
                self._read(child)  # the answer may lie there unread when this process was busy
            if child.is_late() and child.late is None:
                child.late = child.excess()
                child.process.kill()
            self._bury_if_dead(child)

    def _read(self, child: _Child) -> None:
        try:
            for message in child.process.take():
                child.take(message)
                if "event" in message:
                    self._on_event(child.index, unwrapped(message, "event"))
        except FrameError as error:
            child.late = child.late or str(error)
            child.process.kill()
        if child.process.ended and child.overdue_at is None:
            child.overdue_at = time.monotonic() + SECONDS_TO_LEAVE

    def _bury_if_dead(self, child: _Child) -> None:
        code = child.process.exit_code()
        if code is None:
            return
        self.running.remove(child)
        self._read(child)
        seconds, tail = time.monotonic() - child.process.began, child.process.tail
        self.ends[child.index] = JobEnd(*self._how(child, code), child.label, tail, seconds, code)
        child.process.close()

    def _how(self, child: _Child, code: int) -> tuple[Status, str | None]:
        if child.process.ended:
            return child.process.ended
        if child.late:
            return "timeout", child.late
        status, detail = child.process.death(code)
        return status, f"{detail} in {child.label}" if child.inside else detail
