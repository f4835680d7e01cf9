"""Command loaders: `cmd:tool --base {base} --lora {lora} --strength {strength} --out {out}`, any language.

The model's weights are written as safetensors, the command merges the LoRA file into them and writes `{out}`, and what
it wrote is loaded back. The command runs without a shell, in its own process group, under a time limit.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import LoaderSpecError
from harness.isolation.processes import kill_group, kill_tree
from harness.loaders.exchange import SPARE_BYTES, OutputError, load_back, most_bytes, program_of, size_of, write_weights
from harness.loaders.protocol import COMMAND, Load, Subject

if TYPE_CHECKING:
    import torch

PLACES = ("{base}", "{lora}", "{strength}", "{out}")
TAIL = 2000
POLL_SECONDS = 0.5
_REFUSING = re.compile(
    r"^refused: |\bnot (yet )?(support|implement)ed\b|\bunsupported\b|\brefus(es|ing)\b", re.IGNORECASE
)
_CRASHED = re.compile(
    r"^Traceback |\bpanicked at\b|core dumped|^\s+at .+:\d+|^goroutine \d+|Segmentation fault", re.MULTILINE
)
BASE, OUT = "base.safetensors", "merged.safetensors"


class CommandError(RuntimeError):
    """A command loader that gave no merged weights; the message ends with the tail of what it printed."""

    refuses = False


class CommandFailedError(CommandError):
    """The command ended with a non-zero exit status, or was killed by a signal."""


class CommandRefusedError(CommandFailedError):
    """The command ended with an exit status that is not zero, and with a line that says that it does not take this."""

    refuses = True


class CommandTimeoutError(CommandError):
    """The command did not end within the time limit; its whole process group was killed."""


def command_subject(spec: str) -> Subject:
    """Return the subject `spec`; the environment variable LORA_HARNESS_COMMAND_SECONDS changes its time limit.

    Raises:
        LoaderSpecError: the line cannot be split, lacks a placeholder, or names no program.
    """
    seconds = float(os.environ.get("LORA_HARNESS_COMMAND_SECONDS", COMMAND.seconds))
    return Subject(spec, command_loader(spec, seconds=seconds), defaults=replace(COMMAND, seconds=seconds))


def command_loader(spec: str, *, seconds: float = COMMAND.seconds) -> Load:
    """Return the loader that runs the command line after `cmd:`, for at most `seconds` each time.

    A line that begins with `python` or `python3` runs the Python that runs this.

    Raises:
        LoaderSpecError: the line cannot be split, lacks a placeholder, or names no program.
    """
    words = words_of(spec, PLACES, _USAGE)

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
        with tempfile.TemporaryDirectory(prefix="lora-harness-cmd-") as folder:
            base, out = Path(folder) / BASE, Path(folder) / OUT
            write_weights(model, base)
            values = dict(zip(PLACES, (str(base), str(lora), repr(float(strength)), str(out)), strict=True))
            printed = run_command(words, values, out, most_bytes(base), seconds)
            load_back(model, base, out, f"; the command printed: {printed}" if printed else "")
            if printed:
                print(printed)  # who listens to loaders hears this one too
        return model

    return load


def words_of(spec: str, places: Sequence[str], usage: str) -> list[str]:
    """Return the words of a command in which every one of `places` stands.

    Raises:
        LoaderSpecError: one does not, the line cannot be split, or it names no program.
    """
    missing = [place for place in places if place not in spec]
    if missing:
        raise LoaderSpecError(f"{spec!r} lacks {', '.join(missing)}; write {spec.partition(':')[0]}:tool {usage}")
    return program_of(spec)


_USAGE = "--base {base} --lora {lora} --strength {strength} --out {out}"


def _filled(word: str, values: Mapping[str, str]) -> str:
    for place, value in values.items():
        word = word.replace(place, value)
    return word


def run_command(words: Sequence[str], values: Mapping[str, str], out: Path, most: int, seconds: float) -> str:
    """Run a command with `values` in the places of its words; return the tail of what it printed.

    Raises:
        CommandError: it fails, or takes more than `seconds`.
        OutputError: `out`, which it writes, grows over `most` bytes.
    """
    words, log = [_filled(word, values) for word in words], out.with_name("printed.txt")
    with log.open("ab") as sink:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
        try:
            problem = _watch(process, log, out, most, seconds)
        finally:
            _end(process)
    printed = _tail(log)
    if problem is not None:
        raise problem[0](_message(words, problem[1], printed))
    if process.returncode != 0:
        kind = CommandRefusedError if process.returncode > 0 and _refuses(printed) else CommandFailedError
        raise kind(_message(words, _status(process.returncode), printed))
    return printed


def _watch(
    process: subprocess.Popen[bytes], log: Path, out: Path, most: int, seconds: float
) -> tuple[type[RuntimeError], str] | None:
    """Wait for the end of the command; return what is wrong when it must not go on."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))
            return None
        if time.monotonic() > deadline:
            return CommandTimeoutError, f"ran longer than {seconds:g} s and was killed"
        if size_of(out) > most:
            return OutputError, f"was killed: its merged file grew over {most} bytes"
        if size_of(log) > SPARE_BYTES:
            os.truncate(log, 0)  # it appends, so it goes on from here; only the tail is wanted


def _end(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        kill_group(process.pid) if process.returncode is not None else kill_tree(process.pid)
    else:
        process.kill()
    process.wait()


def _status(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def _tail(log: Path) -> str:
    with log.open("rb") as source:
        source.seek(max(0, log.stat().st_size - TAIL))
        return source.read().decode(errors="replace").strip()


def _refuses(printed: str) -> bool:
    """Whether a command's last line says that it does not take the file: no crash in such words, no other error."""
    last = (printed.splitlines() or [""])[-1].strip()
    if _CRASHED.search(printed):
        return re.match(r"([\w.]+\.)?NotImplementedError: \S", last) is not None
    return _REFUSING.search(last) is not None and len(last.split()) > 1


def _message(words: Sequence[str], problem: str, printed: str) -> str:
    said = f"; it printed: {printed}" if printed else "; it printed nothing"
    return f"{Path(words[0]).name} {problem}{said}"
