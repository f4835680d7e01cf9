"""Errors a user can act on: one sentence that names the file, the key or the argument, and what to do."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Bad usage or unreadable input; the command line prints the message and exits with code 2."""


class LoraFileError(UserError):
    """A LoRA file that cannot be read or written.

    `path` names the file, `key` the tensor or configuration key at fault (None when the whole file is),
    `problem` says what is wrong in one clause.
    """

    def __init__(self, path: Path | str, problem: str, *, key: str | None = None) -> None:
        self.path, self.problem, self.key = Path(path), problem, key
        super().__init__(f"{path}: {key}: {problem}" if key else f"{path}: {problem}")


class NoLoraError(LoraFileError):
    """An intact file that is no LoRA of any layout that is known; the problem says what it looks like."""


class LoaderSpecError(UserError):
    """A string that names no loader (unknown name, missing file or attribute, import that fails)."""


def one_line(error: BaseException) -> str:
    """Return `ValueError: message` with the message cut to one line of 200 characters."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:200]}{'...' if len(text) > 200 else ''}" if text else name
