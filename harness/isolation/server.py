"""A program that answers: started once, asked one line of JSON at a time, ended with all that it started.

Its stdout is for answers alone; the end of what it says on stderr is kept. Lines with `heartbeat` only say that it is
alive: where an answer is late, they tell slow from stuck.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from json import dumps, loads  # bound here: a subject may replace the module's own
from typing import Any

from harness.errors import one_line
from harness.isolation.processes import die_with, kill_group, kill_tree, quiet_about_forks
from harness.text import printable

HEARTBEAT = "heartbeat"
MOST_LINE = 1 << 20  # bytes
TAIL_BYTES = 8192
_READ_BYTES, _CHUNKS = 1 << 16, 64
_POLL_SECONDS = 0.5  # where a dead process left its pipes to another one
_SHOWN_LINES, _SHOWN = 3, 200
_ERROR = re.compile(
    r"^(?:[\w.:]+\.|Uncaught )?\w*(?:Error|Exception)\b|^(?:fatal )?error\b|panicked at|^Caused by", re.I
)


class ServerError(Exception):
    """A server gave no answer, or one that says what went wrong: `what` in one line.

    `answered`: it said so itself and goes on; `refused`: it meant to. `late`: it took too long. `frames` say where it
    came from, `printed` is the end of its stderr.
    """

    def __init__(
        self,
        what: str,
        *,
        answered: bool = False,
        refused: bool = False,
        late: bool = False,
        frames: Sequence[str] = (),
        printed: str = "",
    ) -> None:
        self.what, self.frames, self.printed = what, tuple(frames), printed
        self.answered, self.refused, self.late = answered, refused, late
        said = " | ".join(line[:_SHOWN] for line in _telling(printed))
        super().__init__(what + (f"; the end of its stderr: {said}" if said else ""))


def _telling(printed: str) -> list[str]:
    """Return the last lines, from the last one on that names an error: some languages print their stack after it."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    named = max((number for number, line in enumerate(lines) if _ERROR.search(line)), default=len(lines))
    start = min(named, max(0, len(lines) - _SHOWN_LINES))
    shown = lines[start : start + _SHOWN_LINES]
    return shown if start + _SHOWN_LINES >= len(lines) else [*shown[:-1], "…", lines[-1]]


@dataclass
class Server:
    """A running program; `command` are the words that started it.

    It leads a process group of its own, gets SIGKILL where this process ends first (Linux), and the end of its stdin
    everywhere.
    """

    command: Sequence[str]
    heard: float = field(default_factory=time.monotonic)
    beats: int = 0
    _began: float = 0.0
    _answers: bytearray = field(default_factory=bytearray)
    _said: bytes = b""
    _unsent: bytes = b""
    _closed: bool = False
    _open: set[str] = field(default_factory=lambda: {"stdout", "stderr"})  # until their other end is closed

    def __post_init__(self) -> None:
        self.owner = os.getpid()
        pipe = subprocess.PIPE
        watch = partial(die_with, self.owner, signal.SIGKILL) if hasattr(os, "fork") else None
        with quiet_about_forks():
            self._process = subprocess.Popen(
                list(self.command), stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True,
                preexec_fn=watch,
            )  # fmt: skip
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    @property
    def running(self) -> bool:
        """Whether it can be asked, from this process."""
        return not self._closed and self.owner == os.getpid() and self._process.poll() is None

    def ask(self, question: dict[str, Any] | None, seconds: float, *, patience: float | None = None) -> dict[str, Any]:
        """Return the next answer, to `question` if there is one, within `seconds`.

        With `patience`, that many seconds count from the last heartbeat, and `seconds` are the most it may take.

        Raises:
            ServerError: it is dead or late, or what it printed is no answer.
        """
        self._unsent += b"" if question is None else dumps(question).encode() + b"\n"
        self._began = began = self.heard = time.monotonic()
        self.beats, self._said = 0, b""
        while True:
            over = self._process.poll()  # before the last look at what it says
            self._exchange()
            for answer in self._lines():
                if HEARTBEAT not in answer:
                    return answer
                self.beats, self.heard = self.beats + 1, time.monotonic()
            if over is not None:
                raise ServerError(f"the server {_status(over)}", printed=self.said)
            end = began + seconds if patience is None else min(began + seconds, self.heard + patience)
            if time.monotonic() > end:
                raise self.lateness()
            self._wait(end - time.monotonic())

    @property
    def said(self) -> str:
        """The end of what it has printed on stderr since it was asked last."""
        return self._said.decode(errors="replace").strip()

    def hear(self) -> str:
        """Read what it has printed on stderr by now, and return the end of it."""
        self._listen()
        return self.said

    def close(self) -> None:
        """End it, and all that it started; of what another process started, only let go."""
        if self._closed:
            return
        self._closed = True  # its process id may be another's from here on
        if self.owner == os.getpid():
            kill_tree(self._process.pid) if self._process.poll() is None else kill_group(self._process.pid)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()

    def lateness(self) -> ServerError:
        """Return what to say of an answer that was waited for until now."""
        now = time.monotonic()
        alive = f"; its last heartbeat came {now - self.heard:.1f} s before" if self.beats else " and sent no heartbeat"
        what = f"the server gave no answer within {now - self._began:.1f} s{alive}"
        return ServerError(what, late=True, printed=self.said)

    def _exchange(self) -> None:
        """Write and read what can be written and read now."""
        if self._unsent:
            with contextlib.suppress(OSError):  # dead, which shows in a moment
                self._unsent = self._unsent[os.write(self._stream("stdin"), self._unsent) :]
        while len(self._answers) <= MOST_LINE and (chunk := self._read("stdout")):
            self._answers += chunk
        self._listen()

    def _listen(self) -> None:
        for _ in range(_CHUNKS):
            chunk = self._read("stderr")
            if not chunk:
                return
            self._said = (self._said + chunk)[-TAIL_BYTES:]

    def _stream(self, name: str) -> int:
        return int(getattr(self._process, name).fileno())

    def _read(self, name: str) -> bytes:
        try:
            chunk = os.read(self._stream(name), _READ_BYTES)
        except BlockingIOError:
            return b""
        if not chunk:
            self._open.discard(name)
        return chunk

    def _lines(self) -> Iterator[dict[str, Any]]:
        while (end := self._answers.find(b"\n")) >= 0:
            line = bytes(self._answers[:end])
            del self._answers[: end + 1]
            if line.strip():
                yield self._parsed(line)
        if len(self._answers) > MOST_LINE:
            raise ServerError(_junk(bytes(self._answers)), printed=self.said)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            answer = loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ServerError(_junk(line), printed=self.said)
        return answer

    def _wait(self, seconds: float) -> None:
        seconds = max(0.0, min(seconds, _POLL_SECONDS))
        if "stdout" not in self._open:  # it is about to end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            return
        with selectors.DefaultSelector() as selector:
            for name in self._open:
                selector.register(self._stream(name), selectors.EVENT_READ)
            if self._unsent:
                selector.register(self._stream("stdin"), selectors.EVENT_WRITE)
            selector.select(seconds)


def started(command: Sequence[str]) -> Server:
    """Start a server.

    Raises:
        ServerError: the system cannot start it.
    """
    try:
        return Server(command)
    except OSError as error:
        raise ServerError(f"the server cannot be started: {one_line(error)}") from error


def _junk(line: bytes) -> str:
    text = printable(re.sub(r"\s+", " ", line[:400].decode(errors="replace")).strip(), 80)
    return (
        f"the server printed {text!r} on stdout, which is for answers alone, one JSON object a line: "
        "print everything else on stderr"
    )


def _status(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
