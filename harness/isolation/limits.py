"""What one call of a subject may take, and the alarm that ends a call in Python code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from harness.isolation.channel import Channel

GIB = 2**30
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
