"""A time limit on one call of a subject that leaves the process alive when the call can be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from harness.checks.cell import Limit
from harness.isolation.jobs import Channel, TimeLimitExceeded

GRACE_SECONDS = 10.0  # after its own alarm a child may still tidy up before the parent kills it


def call_limit(channel: Channel, seconds: float) -> Limit:
    """Return a guard for calls of the subject: an alarm after `seconds`, and the channel's own limit behind it.

    The alarm raises TimeLimitExceeded in Python code, so the cell goes on with the next example; a call that never
    comes back to Python is ended by the parent process, with the cell.
    """

    @contextmanager
    def limit(label: str, other_seconds: float | None = None) -> Iterator[None]:
        with channel.call(label), alarm(other_seconds or seconds):
            yield

    return limit


@contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Run one call of a subject in this process: a hang or an attempt to exit becomes a RuntimeError.

    Only Python code can be interrupted here; the checks run in child processes, which can be killed.
    """
    try:
        with alarm(seconds):
            yield
    except TimeLimitExceeded as late:
        raise RuntimeError(f"{what}: {late}") from None
    except (SystemExit, GeneratorExit) as leaving:
        raise RuntimeError(f"{what}: raised {type(leaving).__name__}") from leaving


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded inside the block after `seconds`, where the system has such alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeLimitExceeded(f"no answer within the time limit of {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second: the subject may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
