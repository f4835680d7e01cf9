"""Command loaders: `cmd:tool --base {base} --lora {lora} --strength {strength} --out {out}`, any language.

The model's weights are written as safetensors, the command merges the LoRA file into them and writes `{out}`, and what
it wrote is loaded back. The command runs without a shell, in its own process group, under a time limit.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import LoaderSpecError
from harness.isolation.processes import kill_group, kill_tree
from harness.loaders.protocol import COMMAND, Load, Subject

if TYPE_CHECKING:
    import torch

PLACES = ("{base}", "{lora}", "{strength}", "{out}")
TAIL = 2000
SPARE_BYTES = 64 << 20
POLL_SECONDS = 0.5
BASE, OUT = "base.safetensors", "merged.safetensors"


class CommandError(RuntimeError):
    """A command loader that gave no merged weights; the message ends with the tail of what it printed."""


class CommandFailedError(CommandError):
    """The command ended with a non-zero exit status, or was killed by a signal."""


class CommandTimeoutError(CommandError):
    """The command did not end within the time limit; its whole process group was killed."""


class CommandOutputError(CommandError):
    """The merged file is missing, unreadable, too large, or does not fit the model."""


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
    words = _words(spec)

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
        with tempfile.TemporaryDirectory(prefix="lora-harness-cmd-") as folder:
            base, out = Path(folder) / BASE, Path(folder) / OUT
            _write(model, base)
            values = dict(zip(PLACES, (str(base), str(lora), repr(float(strength)), str(out)), strict=True))
            printed = _run([_filled(word, values) for word in words], Path(folder), seconds)
            _load_back(model, out, printed)
            if printed:
                print(printed)  # who listens to loaders hears this one too
        return model

    return load


def _words(spec: str) -> list[str]:
    line = spec.removeprefix("cmd:")
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise LoaderSpecError(f"{spec!r}: {error}") from None
    missing = [place for place in PLACES if place not in line]
    if missing:
        raise LoaderSpecError(f"{spec!r} lacks {', '.join(missing)}; write cmd:tool {_USAGE}")
    if words[0] in ("python", "python3"):  # whichever comes first on the PATH may be another one, without torch
        words[0] = sys.executable
    if shutil.which(words[0]) is None:
        raise LoaderSpecError(f"{spec!r}: there is no program {words[0]!r} here or on the PATH")
    return words


_USAGE = "--base {base} --lora {lora} --strength {strength} --out {out}"


def _filled(word: str, values: Mapping[str, str]) -> str:
    for place, value in values.items():
        word = word.replace(place, value)
    return word


def _write(model: torch.nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    # Cloned because safetensors refuses tied weights, which share memory.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}, path)


def _run(words: Sequence[str], folder: Path, seconds: float) -> str:
    """Run the command; return the tail of what it printed."""
    log = folder / "printed.txt"
    with log.open("ab") as sink:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
        try:
            problem = _watch(process, folder, seconds)
        finally:
            _end(process)
    printed = _tail(log)
    if problem is not None:
        raise problem[0](_message(words, problem[1], printed))
    if process.returncode != 0:
        raise CommandFailedError(_message(words, _status(process.returncode), printed))
    return printed


def _watch(process: subprocess.Popen[bytes], folder: Path, seconds: float) -> tuple[type[CommandError], str] | None:
    """Wait for the end of the command; return what is wrong when it must not go on."""
    deadline = time.monotonic() + seconds
    most = _most_bytes(folder)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))
            return None
        if time.monotonic() > deadline:
            return CommandTimeoutError, f"ran longer than {seconds:g} s and was killed"
        if _size(folder / OUT) > most:
            return CommandOutputError, f"was killed: its merged file grew over {most} bytes"
        if _size(folder / "printed.txt") > SPARE_BYTES:
            os.truncate(folder / "printed.txt", 0)  # it appends, so it goes on from here; only the tail is wanted


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _most_bytes(folder: Path) -> int:
    return 2 * _size(folder / BASE) + SPARE_BYTES


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


def _message(words: Sequence[str], problem: str, printed: str) -> str:
    said = f"; it printed: {printed}" if printed else "; it printed nothing"
    return f"{Path(words[0]).name} {problem}{said}"


def _load_back(model: torch.nn.Module, out: Path, printed: str) -> None:
    """Load the merged file, all of the model's tensors or only the changed ones, into `model`."""
    said = f"; the command printed: {printed}" if printed else ""
    if not out.is_file():
        raise CommandOutputError(f"the command wrote no file at {{out}}{said}")
    most = _most_bytes(out.parent)
    if _size(out) > most:
        raise CommandOutputError(f"the merged file has {_size(out)} bytes, more than the {most} expected at most{said}")
    merged = _read(out, said)
    problem = _misfit(model.state_dict(), merged)
    if problem:
        raise CommandOutputError(f"the merged file {problem}{said}")
    model.load_state_dict(merged, strict=False)


def _read(out: Path, said: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(out)
    except SafetensorError as error:
        raise CommandOutputError(f"the merged file is no valid safetensors file: {error}{said}") from error


def _misfit(wanted: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]) -> str | None:
    if not merged:
        return "has no tensors"
    unknown = [name for name in merged if name not in wanted]
    if unknown:
        return f"has {len(unknown)} tensors that the model has not, for example {unknown[0]!r}"
    for name, tensor in merged.items():
        if tensor.shape != wanted[name].shape:
            return f"has {name!r} with shape {list(tensor.shape)}, the model has {list(wanted[name].shape)}"
    return None
