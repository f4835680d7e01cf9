"""What a run may take: limits, the alarm that ends one call, and the channel through which a job talks to its run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType

from harness.isolation.processes import waited

GIB = 2**30
_LEAST = 0.01  # seconds: clocks of a call differ by less
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
    """Raise TimeLimitExceeded(`what`) inside the block after `seconds`, where the system has such alarms.

    What the block waits for a processor does not count: on a busy machine that is no fault of the subject's.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    rang: list[TimeLimitExceeded] = []
    end, before = time.monotonic() + seconds, waited()

    def ring(number: int, frame: FrameType | None) -> None:
        rest = end + waited() - before - time.monotonic()
        if rest > _LEAST:
            signal.setitimer(signal.ITIMER_REAL, rest, 1.0)
            return
        rang.append(TimeLimitExceeded(what or f"no answer within the time limit of {seconds:g} s (--time-limit)"))
        raise rang[-1]

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second: the subject may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if rang:  # it was swallowed, by a bare except or in a `__del__`
        raise rang[0]


class SubjectExitError(Exception):
    """The subject tried to end the process: it raised SystemExit, KeyboardInterrupt or GeneratorExit."""


class Channel:
    """What a job gets: `send(event)` streams a message out, `call(label)` puts a time limit on a block."""

    apart = True  # whether this process is one of a run's own, in which no foreign code should run
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


class LocalChannel(Channel):
    """The same without a child: an alarm interrupts Python code, nothing interrupts a hang inside C."""

    apart = False

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
