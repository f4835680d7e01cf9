"""One call of a subject: the guard around it, and whatever it raises told so that its author can act.

An exception is a refusal where the subject says on purpose, in its own words, that it does not take a file.
"""

from __future__ import annotations

import contextlib
import dis
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from harness.isolation.limits import TimeLimitExceeded
from harness.isolation.server import ServerError
from harness.isolation.subject import SubjectLostError

if TYPE_CHECKING:
    import torch

_FRAMES, _LINES = 5, 40
_LINE, _MESSAGE = 300, 4000  # characters
_HARNESS = str(Path(__file__).parents[1])
_REFUSALS = (NotImplementedError, ValueError)
_REFUSING = re.compile(r"\b(?:un)?support|\bimplement|\bonly\b|\bmust\b|\brefus", re.IGNORECASE)  # in words of others
_NO_ADAPTER = re.compile(r"Adapter name\(s\) .* not in the list of present adapters")  # diffusers' `set_adapters`
_WANTS_GPU = re.compile(r"\b(?:CUDA|NVIDIA|HIP|ROCm)\b")
_LIBRARIES = {"torch", "numpy", "safetensors", "json", *sys.stdlib_module_names}


@dataclass(frozen=True)
class Raised:
    """The loader raised (LH901), left a model that cannot be measured (LH902) or refused the file (LH903).

    `what` says so in one line. `message` is all that the exception said, `frames` where it came from, innermost last,
    `printed` what the process printed last. `killed`: by a signal from outside, which says nothing of the loader.
    `loaded`: no call failed, but the model that it left.
    """

    code: str
    what: str
    timed_out: bool = False
    killed: bool = False
    loaded: bool = False
    message: str = ""
    frames: Sequence[str] = ()
    printed: str = ""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield, labelled, all that an exception said, where it came from, and what was printed before an end."""
        lines = self.message.splitlines()
        yield from (("said", line) for line in lines[:_LINES] if len(lines) > 1)
        if len(lines) > _LINES:
            yield "said", f"… {len(lines) - _LINES} more lines"
        yield from (("at", frame) for frame in self.frames)
        yield from (("printed", line) for line in self.printed.splitlines()[-3:])
        if _WANTS_GPU.search(f"{self.what} {self.message}"):
            yield "gpu", "a loader finds none here unless it declares that it needs one: @loader(gpu=True)"


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
        raise CallFailedError(raised_by(error)) from error
    if result is not None and not isinstance(result, torch.nn.Module):
        what = f"load returned {type(result).__name__}, but should return the model or None"
        raise CallFailedError(Raised("LH902", what))
    return model if result is None else result


_LISTENING: ContextVar[list[str] | None] = ContextVar("listening", default=None)
_SAID_LINES, _SAID_LINE = 400, 400


def is_listened_to() -> bool:
    """Whether what the subject says is kept: then nothing may quieten it."""
    return _LISTENING.get() is not None


@contextmanager
def listened(lines: list[str]) -> Iterator[None]:
    """Add to `lines` what the subject says inside the block: warnings, log records that it lets through, prints."""
    text = io.StringIO()
    token = _LISTENING.set(lines)
    try:
        with (
            _logged(lines),
            _logged_by_loguru(lines),
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            yield
    finally:
        _LISTENING.reset(token)
        lines += [line.strip() for line in re.split(r"[\r\n]+", text.getvalue()) if line.strip()]
        lines[_SAID_LINES:] = []
        lines[:] = [line[:_SAID_LINE] for line in lines]


@contextmanager
def _logged(lines: list[str]) -> Iterator[None]:
    """Keep every record that reaches a logger's handlers, whichever they are and whether or not it propagates."""
    handle = logging.Logger.handle

    def kept(logger: logging.Logger, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a message that cannot be formatted is the subject's affair
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            lines.append(f"{prefix}{record.getMessage()}")
        handle(logger, record)

    logging.Logger.handle = kept  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        logging.Logger.handle = handle  # type: ignore[method-assign]


@contextmanager
def _logged_by_loguru(lines: list[str]) -> Iterator[None]:
    """Keep what goes through loguru, where it was imported: it writes to the stderr that there was at that time."""
    logger = getattr(sys.modules.get("loguru"), "logger", None)
    if logger is None:
        yield
        return

    def kept(message: Any) -> None:
        prefix = "warning: " if message.record["level"].no >= logging.WARNING else ""
        lines.append(f"{prefix}{message.record['message']}")

    sink = logger.add(kept, level="DEBUG", catch=True)
    try:
        yield
    finally:
        logger.remove(sink)


@contextmanager
def _warned() -> Iterator[None]:
    """Keep warnings from the rest of the run; who listens gets them."""
    lines = _LISTENING.get()
    with warnings.catch_warnings(record=lines is not None) as caught:
        warnings.simplefilter("ignore" if lines is None else "always")
        yield
    if lines is not None:
        lines += [f"warning: {warning.message}" for warning in caught or ()]


@contextmanager
def _contained(left: list[str]) -> Iterator[None]:
    """Keep warnings, and what the subject changes in torch for everybody, from the rest of the run."""
    import torch

    state: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    }
    before = {what: get() for what, (get, _) in state.items()}
    try:
        with _warned():
            yield
    finally:
        for what, (get, set_back) in state.items():
            if get() != before[what]:
                left.append(what)
                set_back(before[what])


def raised_by(error: BaseException) -> Raised:
    """Return what to say of an exception that a call of the subject ended with."""
    if isinstance(error, ServerError):
        return _raised_elsewhere(error)
    try:
        text = str(error)
    except BaseException as worse:  # its own `__str__` is the subject's code too
        return Raised("LH901", f"{type(error).__name__}, whose text cannot be read ({type(worse).__name__})")
    code, what = "LH903" if _is_refusal(error, text) else "LH901", _title(error, text)
    if _NO_ADAPTER.search(text):  # the load itself took nothing of the file and said nothing: it refused nothing
        code, what = "LH901", f"the load made no adapter of the file, and what came next raised {what}"
    return Raised(code, what, message=text[:_MESSAGE], frames=tuple(_frames(error)))


def _raised_elsewhere(error: ServerError) -> Raised:
    code = "LH903" if error.refused else "LH901"
    what, frames = error.what[:_LINE], error.frames[-_FRAMES:]
    return Raised(code, what, error.late, frames=frames, printed=error.printed[-_MESSAGE:])


def _title(error: BaseException, text: str) -> str:
    """Return `ValueError: last line of the message`: where a message has several, the last says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:_LINE]}" if lines else type(error).__name__


def _is_refusal(error: BaseException, text: str) -> bool:
    """Whether the subject said on purpose that it does not take this: its own `raise`, with a sentence."""
    kind = type(error)
    if isinstance(said := getattr(kind, "refuses", None), bool):  # of a program, that ended with a status
        return said
    own = kind.__module__.partition(".")[0] not in {"builtins", *_LIBRARIES}
    if not (kind in _REFUSALS or own or _REFUSING.search(text)) or len(text.split()) < 2:
        return False
    innermost = _innermost(error.__traceback__)
    if innermost is None or _repeats_another(error):
        return False
    package = str(innermost.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    instruction = innermost.tb_frame.f_code.co_code[innermost.tb_lasti]
    return package not in _LIBRARIES and dis.opname[instruction] == "RAISE_VARARGS"


def _repeats_another(error: BaseException) -> bool:
    """Whether it only hands on what another exception said: a crash in other words."""
    other = error.__cause__ or error.__context__
    return other is not None and str(other) != "" and str(other).strip("'\"") in str(error)


def _innermost(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _frames(error: BaseException) -> Iterator[str]:
    """Yield where the exception went through the subject's code, innermost last: `file.py:12 in load: line`."""
    steps = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not _is_ours(frame)]
    summary = traceback.StackSummary.extract(iter(steps[-_FRAMES:]))
    yield from (f"{Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}".removesuffix(": ") for f in summary)


def _is_ours(frame: FrameType) -> bool:
    """Whether a frame is the harness's own; its loaders are subjects like others."""
    name = frame.f_code.co_filename
    return name.startswith(_HARNESS) and not name.startswith(str(Path(_HARNESS, "loaders", "live")))


def lost_raised(lost: SubjectLostError, where: str = "") -> Raised:
    """Return what to say of a subject whose process gave no answer, `where` it was last."""
    why = {"timeout": "", "memory": "out of memory: ", "killed": "process died: "}.get(lost.status, "")
    late = lost.status == "timeout"
    return Raised("LH901", f"{why}{lost.what}{where}", timed_out=late, killed=lost.from_outside, printed=lost.tail)
