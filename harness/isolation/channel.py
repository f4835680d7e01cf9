"""How a job talks to the run that started it: events as they come, and the calls that a time limit watches."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

LENGTH = struct.Struct(">Q")


class TimeLimitExceeded(BaseException):
    """A call of the subject ran past its time limit (in-process only: a child is killed instead).

    Not an Exception, so that a subject's own `except Exception` does not swallow it.
    """


class SubjectExitError(Exception):
    """The subject tried to end the process: it raised SystemExit, KeyboardInterrupt or GeneratorExit."""


class Channel:
    """What a job gets: `send(obj)` streams a picklable object out, `call(label)` puts a time limit on a block."""

    _exits: tuple[type[BaseException], ...] = (SystemExit, GeneratorExit)

    def send(self, event: object) -> None:
        """Hand `event` to the run's `on_event` now, so that it outlives the death of this job."""
        raise NotImplementedError

    @contextlib.contextmanager
    def call(self, label: str) -> Iterator[None]:
        """Run the block as one call of the subject: limited in time, and unable to end the process by raising.

        Raises:
            SubjectExitError: the block raised SystemExit or GeneratorExit (in a child, KeyboardInterrupt too).
        """
        self._start(label)
        try:
            yield
        except self._exits as error:
            raise SubjectExitError(f"raised {type(error).__name__}({', '.join(map(repr, error.args))})") from error
        finally:
            self._end()

    def _start(self, label: str) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class PipeChannel(Channel):
    """The child's end: each message is one frame, an 8-byte length and a pickle."""

    # A child is in no terminal's foreground group, so only the subject can raise KeyboardInterrupt in it.
    _exits = (SystemExit, GeneratorExit, KeyboardInterrupt)

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._owner = descriptor, os.getpid()

    def send(self, event: object) -> None:
        """Write one event; raises what pickle raises when it cannot be pickled."""
        self._write(("event", event))

    def finish(self, status: str, detail: str | None) -> None:
        """Say how the job ended; the last message."""
        self._write(("finish", status, detail))

    def _start(self, label: str) -> None:
        self._write(("start", label, time.monotonic()))

    def _end(self) -> None:
        self._write(("end",))

    def _write(self, message: tuple[Any, ...]) -> None:
        if os.getpid() != self._owner:  # a process the subject forked, running on in a copy of the job
            return
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        rest = memoryview(LENGTH.pack(len(body)) + body)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


class LocalChannel(Channel):
    """The same without a child: a timer interrupts Python code, nothing interrupts a hang inside C."""

    def __init__(self, seconds: float, on_event: Callable[[object], None]) -> None:
        self._seconds, self._on_event = seconds, on_event
        self.label: str | None = None
        self._previous: Any = None
        self._timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def send(self, event: object) -> None:
        """Call `on_event` with `event`."""
        self._on_event(event)

    def _start(self, label: str) -> None:
        self.label = label
        if self._timed:
            self._previous = signal.signal(signal.SIGALRM, self._overdue)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def _end(self) -> None:
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)

    def _overdue(self, number: int, frame: object) -> None:
        raise TimeLimitExceeded(overdue(self.label, self._seconds))


def overdue(label: str | None, seconds: float) -> str:
    """Return the sentence for a call that ran past its limit."""
    return f"{label}: no answer within {seconds:g} s"
