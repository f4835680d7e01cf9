"""Whatever ends a command, as one sentence and an exit code: nobody should have to read a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from harness.errors import UserError, one_line

BAD, INTERRUPTED, CLOSED_PIPE = 2, 130, 141
_EXTRAS = {
    "check": ("torch", "diffusers", "transformers", "peft", "hypothesis", "matplotlib"),
    "images": ("skimage", "PIL"),
    "audit": ("fsspec", "pyarrow"),
    "cluster": ("distributed", "dask"),
    "gguf": ("gguf",),
}


class Failure(click.ClickException):
    """A sentence on stderr and an exit code."""

    exit_code = BAD

    def show(self, file: Any = None) -> None:
        """Print the sentence."""
        from harness.text import printable

        click.echo(f"error: {printable(self.message, 2000)}", err=True)


class Interrupted(Failure):
    """Ctrl-C."""

    exit_code = INTERRUPTED


@contextlib.contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Let the block end in `Failure`, or quietly where the reader of the output has gone, for all that can go wrong."""
    try:
        try:
            _require_stdout()
            yield
        finally:
            _flush()
    except UserError as error:
        raise Failure(str(error)) from None
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich ends with 1, which means that something is wrong
            sys.exit(CLOSED_PIPE)
        raise
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None
    except ImportError as error:
        raise Failure(_missing(error)) from None
    except MemoryError:
        raise Failure("not enough memory for this; free some, or ask for less at once") from None
    except OSError as error:
        _drop_output()
        if error.errno == errno.EPIPE:
            sys.exit(CLOSED_PIPE)
        raise Failure(_of_the_system(error)) from None


def _require_stdout() -> None:
    if sys.stdout is None:
        raise UserError("standard output is closed, so nothing could be said")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, or Python would complain when it ends."""
    with contextlib.suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _missing(error: ImportError) -> str:
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in _EXTRAS.items() if name in modules), None)
    if extra and isinstance(error, ModuleNotFoundError):
        return f'this needs {name}, which is not installed: pip install "lora-harness[{extra}]"'
    return one_line(error)


def _of_the_system(error: OSError) -> str:
    what = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what
