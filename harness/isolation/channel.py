"""How a job talks to the run that started it: events as they come, and the calls that a time limit watches."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from harness.isolation.limits import alarm

LENGTH = struct.Struct(">Q")


class SubjectExitError(Exception):
    """The subject tried to end the process: it raised SystemExit, KeyboardInterrupt or GeneratorExit."""


class Channel:
    """What a job gets: `send(obj)` streams a picklable object out, `call(label)` puts a time limit on a block."""

    _exits: tuple[type[BaseException], ...] = (SystemExit, GeneratorExit)

    def send(self, event: object) -> None:
        """Hand `event` to the run's `on_event` now, so that it outlives the death of this job."""
        raise NotImplementedError

    @contextlib.contextmanager
    def call(self, label: str, seconds: float | None = None) -> Iterator[None]:
        """Run the block as one call of the subject: limited in time, and unable to end the process by raising.

        `seconds` takes the place of the run's own limit.

        Raises:
            SubjectExitError: the block raised SystemExit or GeneratorExit (in a child, KeyboardInterrupt too).
        """
        try:
            with self._watched(label, seconds):
                yield
        except self._exits as error:
            raise SubjectExitError(f"raised {type(error).__name__}({', '.join(map(repr, error.args))})") from error

    def _watched(self, label: str, seconds: float | None) -> AbstractContextManager[None]:
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

    @contextlib.contextmanager
    def _watched(self, label: str, seconds: float | None) -> Iterator[None]:
        self._write(("start", label, time.monotonic(), seconds))
        try:
            yield
        finally:
            self._write(("end",))

    def _write(self, message: tuple[Any, ...]) -> None:
        if os.getpid() != self._owner:  # a process the subject forked, running on in a copy of the job
            return
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        rest = memoryview(LENGTH.pack(len(body)) + body)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


class LocalChannel(Channel):
    """The same without a child: an alarm interrupts Python code, nothing interrupts a hang inside C."""

    def __init__(self, seconds: float, on_event: Callable[[object], None]) -> None:
        self._seconds, self._on_event = seconds, on_event
        self.label: str | None = None
        self.unheard: BaseException | None = None  # what `on_event` raised: no failure of the job

    def send(self, event: object) -> None:
        """Call `on_event` with `event`."""
        try:
            self._on_event(event)
        except BaseException as error:
            self.unheard = error
            raise

    def _watched(self, label: str, seconds: float | None) -> AbstractContextManager[None]:
        self.label, allowed = label, seconds or self._seconds
        return alarm(allowed, overdue(label, allowed))


def overdue(label: str | None, seconds: float) -> str:
    """Return the sentence for a call that ran past its limit."""
    return f"{label}: no answer within {seconds:g} s"
