"""Keep what a library prints, logs and warns about out of the harness's own output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Drop prints to stdout and Python warnings inside the block, and messages of `loggers` below the level error."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name in loggers:
            stack.enter_context(_only_errors(logging.getLogger(name)))
        yield


@contextlib.contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
