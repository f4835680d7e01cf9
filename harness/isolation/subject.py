"""The process in which a subject's code runs: asked one thing at a time, killed when late, started again when needed.

It holds no pipe but its own, answers with data, and judges nothing. Where no process can be forked, or none is wanted,
the same questions are answered here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from harness.isolation.child import Ends
from harness.isolation.elsewhere import Elsewhere, become
from harness.isolation.frames import FrameError, Frames, unwrapped, wrapped
from harness.isolation.limits import GRACE_SECONDS
from harness.isolation.process import FROM_OUTSIDE, READ_BYTES, Process, Status, wait_for
from harness.isolation.processes import can_fork, kill_orphans, waited

Part = Callable[[Any], object]
Answer = Callable[[Any, Part], Any]
"""Answers an order, a message, by another; hands on parts of it, messages too, on the way."""

START_SECONDS = 300.0  # to import what the subject imports


def _goes_on() -> bool:
    return False


def unheard(part: Any) -> None:
    """Take a part that only says that the answer is on its way."""


class SubjectLostError(Exception):
    """The process of a subject gave no answer: `status` says why, `what` in one clause, `tail` what it printed last.

    `from_outside`: it was killed, by a signal that nothing in it need have sent.
    """

    def __init__(self, status: Status, what: str, tail: str = "", *, from_outside: bool = False) -> None:
        super().__init__(what)
        self.status, self.what, self.tail, self.from_outside = status, what, tail, from_outside


class Asked(Protocol):
    """Where a subject's code runs."""

    def ask(self, order: Any, seconds: float, on_part: Part = unheard, *, parts: int = 0) -> Any:
        """Return the answer to `order`; it, and each of at most `parts` parts, must come within `seconds` of the last.

        Raises:
            SubjectLostError: none came.
        """


class Here:
    """Answers in this process, where nothing ends a hang in C, a crash or a call of `os._exit`."""

    def __init__(
        self, answer: Answer, prepare: Callable[[], object] = lambda: None, is_over: Callable[[], bool] = _goes_on
    ) -> None:
        self._answer, self._prepare, self._is_over = answer, prepare, is_over

    def ask(self, order: Any, seconds: float, on_part: Part = unheard, *, parts: int = 0) -> Any:
        """Return the answer."""
        if self._is_over():
            with contextlib.suppress(Exception):  # which the call is told
                self._prepare()
        return self._answer(order, on_part)


@dataclass(frozen=True)
class Timed:
    """Says of every answer of `asked` how many seconds it took."""

    asked: Asked
    on_answer: Callable[[float], object]

    def ask(self, order: Any, seconds: float, on_part: Part = unheard, *, parts: int = 0) -> Any:
        """Return the answer."""
        began = time.monotonic()
        try:
            return self.asked.ask(order, seconds, on_part, parts=parts)
        finally:
            self.on_answer(time.monotonic() - began)


class Apart:
    """Answers in a child of its own, which lives until it fails to answer, or says that what it prepared is over."""

    def __init__(
        self, serve: Callable[[Ends], None], memory_limit: int | None, first_seconds: float = 0.0, *, gpu: bool = False
    ) -> None:
        self._serve, self._memory_limit, self._first_seconds, self._gpu = serve, memory_limit, first_seconds, gpu
        self._process: Process | None = None
        self._number = 0

    def ask(self, order: Any, seconds: float, on_part: Part = unheard, *, parts: int = 0) -> Any:
        """Return the answer, of a second process where the first was killed from outside and nobody heard its parts."""
        return self._twice(lambda: self._asked(order, seconds, on_part, parts), may=on_part is unheard)

    def _twice(self, do: Callable[[], Any], *, may: bool = True) -> Any:
        try:
            return do()
        except SubjectLostError as lost:
            if not (may and lost.from_outside):
                raise
        return do()

    def _asked(self, order: Any, seconds: float, on_part: Part, parts: int) -> Any:
        self._begin()
        assert self._process is not None
        self._number += 1
        with contextlib.suppress(OSError):  # it is dead, which shows when it does not answer
            self._process.order({"number": self._number, "order": order})
        more = self._first_seconds if self._number == 1 else 0.0  # to import what the first trial needs
        return self._next(seconds + more, on_part, parts)

    def begin(self) -> None:
        """Start the process, unless it runs, and wait until it has imported what the subject needs.

        Raises:
            SubjectLostError: it could not.
        """
        self._twice(self._begin)

    def _begin(self) -> None:
        if self._process is None:
            self._process = Process(self._serve, trusted=False, memory_limit=self._memory_limit, gpu=self._gpu)
            self._number = 0
            self._next(START_SECONDS, unheard, 0)

    def _next(self, seconds: float, on_part: Part, parts: int) -> Any:
        assert self._process is not None
        wait = _Wait(self._process, self._number, seconds, parts)
        try:
            answer = wait.answer(on_part)
        except SubjectLostError:
            self.close()
            raise
        if wait.over:
            self.close()
        return answer

    def close(self) -> None:
        """End the process, and all that it started."""
        if self._process is not None:
            self._process.kill()
            self._process.close()
            self._process = None
            kill_orphans()


def started_anew(asked: object) -> bool:
    """End the process that answers, so that a new one answers next; False where there is none of its own."""
    if isinstance(asked, Timed):
        return started_anew(asked.asked)
    if isinstance(asked, Apart):
        asked.close()
    return isinstance(asked, Apart)


def answer_orders(ends: Ends, begin: Callable[[], Answer], is_over: Callable[[], bool] = _goes_on) -> None:
    """Answer orders, as long as they come, with what `begin` returns once all is imported that the subject needs.

    Each answer says whether what `begin` prepared `is_over`: then another child is to answer the next order, or what
    is prepared again would take the time of a call.
    """
    owner = os.getpid()
    answer = begin()
    gc.freeze()  # every collection of garbage would look through all that the subject has imported
    ends.say({"number": 0, "answer": "ready"})
    for message in _orders(ends.orders):
        number = message["number"]
        answered = answer(message["order"], partial(_say_part, ends, number))
        if os.getpid() != owner:  # a process that the subject forked, running on in a copy of the loop
            os._exit(0)
        ends.say(wrapped("answer", answered, number=number, over=is_over()))
        if number == 1:  # and all that its first call has
            gc.collect()
            gc.freeze()


def _say_part(ends: Ends, number: int, part: Any) -> None:
    ends.say(wrapped("part", part, number=number))


def _orders(descriptor: int) -> Iterator[Any]:
    frames = Frames()
    while chunk := os.read(descriptor, READ_BYTES):
        yield from frames.feed(chunk)


@dataclass
class _Wait:
    """Waiting for the answer with a number; `parts` of it may come before."""

    process: Process
    number: int
    seconds: float
    parts: int
    waited: float = 0.0  # for a processor, before the last sign of life
    over: bool = False  # what answered wants to be started anew

    def answer(self, on_part: Part) -> Any:
        deadline = self._deadline()
        while True:
            over = self.process.exit_code()  # before the last look at its messages
            for kind, content in self._messages():
                if kind == "answer":
                    return content
                on_part(content)
                deadline = self._deadline()
            left = self._left(deadline)
            self._raise_if_lost(over, left)
            wait_for([self.process], left)

    def _deadline(self) -> float:
        self.waited = waited(self.process.pid)
        return time.monotonic() + self.seconds + GRACE_SECONDS

    def _left(self, deadline: float) -> float:
        """Return the seconds it still has; those in which it stood in line for a processor are given back."""
        left = deadline - time.monotonic()
        return left if left > 0 else left + waited(self.process.pid) - self.waited

    def _messages(self) -> Iterator[tuple[str, Any]]:
        try:
            for message in self.process.take():
                kind, content = _content(message, self.number)
                self.parts -= kind == "part"
                self.over = bool(message.get("over"))
                if self.parts < 0:
                    raise FrameError("more messages than it was asked for")
                yield kind, content
        except FrameError as error:
            raise SubjectLostError("raised", f"its process sent {error}", self.process.tail) from error

    def _raise_if_lost(self, over: int | None, left: float) -> None:
        process = self.process
        if process.ended and process.ended[0] != "done":
            raise SubjectLostError(process.ended[0], process.ended[1] or process.ended[0], process.tail)
        if over is not None:
            raise SubjectLostError(*process.death(over), process.tail, from_outside=over in FROM_OUTSIDE)
        if left <= 0:
            raise SubjectLostError("timeout", f"no answer within {self.seconds:g} s", process.tail)


def _content(message: Any, number: int) -> tuple[str, Any]:
    kinds = [kind for kind in ("part", "answer") if isinstance(message, dict) and kind in message]
    if not kinds or message.get("number") != number:
        raise FrameError("a message that answers nothing")
    return kinds[0], unwrapped(message, kinds[0])


@contextlib.contextmanager
def subject_process(
    answer: Answer,
    *,
    prepare: Callable[[], object] = lambda: None,
    is_over: Callable[[], bool] = _goes_on,
    apart: bool,
    memory_limit: int | None = None,
    elsewhere: Elsewhere | None = None,
    gpu: bool = False,
) -> Iterator[Asked]:
    """Give the block somebody to ask: a child that calls `prepare` once, or with `apart` false this process.

    Where what it prepared `is_over`, it is prepared again before the next order, not within the order's time.
    What answers `elsewhere` is always a child, which goes on there. A child finds the GPUs with `gpu` alone.
    """

    def serve(ends: Ends) -> None:
        def begin() -> Answer:
            prepare()
            return answer

        answer_orders(ends, begin, is_over)

    if elsewhere is None and not (apart and can_fork()):
        prepare()  # not within the time of the first question
        yield Here(answer, prepare, is_over)
        return
    if elsewhere:
        asked = Apart(partial(become, elsewhere), memory_limit, START_SECONDS, gpu=gpu)
    else:
        asked = Apart(serve, memory_limit, gpu=gpu)
    try:
        yield asked
    finally:
        asked.close()
