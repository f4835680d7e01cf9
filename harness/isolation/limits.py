"""One call of a subject: what it may take, the alarm that ends it, and whatever it raises turned into data.

A job talks to the run that started it through a channel: events as they come, and the calls that a limit watches.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from harness.errors import one_line

if TYPE_CHECKING:
    import torch

GIB = 2**30
LENGTH = struct.Struct(">Q")
GRACE_SECONDS = 10.0  # after its own alarm a child may still tidy up before the parent kills it

Limit = Callable[[str, "float | None"], AbstractContextManager[None]]  # label, seconds (None: the default)


@dataclass(frozen=True)
class Limits:
    """What one call of a subject may take: seconds, and bytes over what the harness uses. `workers=0`: no isolation.

    `seconds=None` stands for what the subject has by default.
    """

    seconds: float | None = None
    memory: int | None = 4 * GIB
    workers: int = 2


class TimeLimitExceeded(BaseException):
    """A call of the subject ran past its time limit and was interrupted where it was.

    Not an Exception, so that a subject's own `except Exception` does not swallow it.
    """


def no_limit(label: str, seconds: float | None = None) -> AbstractContextManager[None]:
    """Limit nothing."""
    return nullcontext()


@contextmanager
def alarm(seconds: float, what: str | None = None) -> Iterator[None]:
    """Raise TimeLimitExceeded(`what`) inside the block after `seconds`, where the system has such alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeLimitExceeded(what or f"no answer within the time limit of {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second: the subject may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class SubjectExitError(Exception):
    """The subject tried to end the process: it raised SystemExit, KeyboardInterrupt or GeneratorExit."""


class Channel:
    """What a job gets: `send(obj)` streams a picklable object out, `call(label)` puts a time limit on a block."""

    _exits: tuple[type[BaseException], ...] = (SystemExit, GeneratorExit)

    def send(self, event: object) -> None:
        """Hand `event` to the run's `on_event` now, so that it outlives the death of this job."""
        raise NotImplementedError

    @contextmanager
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

    @contextmanager
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


def call_limit(channel: Channel | None, seconds: float) -> Limit:
    """Return a guard for calls of the subject: an alarm after `seconds`, and the channel's own limit behind it.

    The alarm raises TimeLimitExceeded in Python code, so the job goes on with its next call; a call that never comes
    back to Python is ended by the parent process, with the job. Without a channel there is only the alarm.
    """

    @contextmanager
    def limit(label: str, other_seconds: float | None = None) -> Iterator[None]:
        allowed = other_seconds or seconds
        with channel.call(label, allowed + GRACE_SECONDS) if channel else nullcontext(), alarm(allowed):
            yield

    return limit


@dataclass(frozen=True)
class Raised:
    """The loader raised, answered with rubbish or left a model that cannot be measured: `code` is LH901 or LH902."""

    code: str
    what: str
    timed_out: bool = False


class CallFailedError(Exception):
    """A call did not end as it should; `raised` says how."""

    def __init__(self, raised: Raised) -> None:
        self.raised = raised


def guarded(
    model: torch.nn.Module,
    call: Callable[[torch.nn.Module], object],
    limit: AbstractContextManager[None],
    left: list[str],
) -> torch.nn.Module:
    """Run one call of the subject under its time limit; what it leaves changed in torch itself is added to `left`.

    Raises:
        CallFailedError: it raised, took too long or returned something else than a model or None.
    """
    import torch

    try:
        with limit, _contained(left):
            result = call(model)
    except TimeLimitExceeded as late:
        raise CallFailedError(Raised("LH901", str(late), timed_out=True)) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a subject that raises SystemExit is data, not the end of the run
        raise CallFailedError(Raised("LH901", one_line(error))) from error
    if result is not None and not isinstance(result, torch.nn.Module):
        what = f"load returned {type(result).__name__}, but should return the model or None"
        raise CallFailedError(Raised("LH902", what))
    return (model if result is None else result).eval()


@contextmanager
def _contained(left: list[str]) -> Iterator[None]:
    """Keep warnings and the default dtype from the rest of the run."""
    import torch

    dtype = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if torch.get_default_dtype() != dtype:
            left.append("torch's default dtype")
            torch.set_default_dtype(dtype)
