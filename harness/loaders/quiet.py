"""Keep what a library prints, logs and warns about out of the harness's own output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib import import_module

_WITH_BARS = ("diffusers", "transformers")  # these two show progress bars too, for every model they load


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Drop prints to stdout and Python warnings inside the block, and messages of `loggers` below the level error.

    Of diffusers and transformers, named as loggers, the progress bars go too.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name in loggers:
            stack.enter_context(_only_errors(logging.getLogger(name)))
            if name in _WITH_BARS:
                stack.enter_context(_no_bars(name))
        yield


@contextlib.contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _no_bars(library: str) -> Iterator[None]:
    bars = import_module(f"{library}.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
