"""One call of a subject: contained, timed, and whatever it raises turned into data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import one_line
from harness.isolation.limits import TimeLimitExceeded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Raised:
    """The loader raised, answered with rubbish or left a model that cannot be measured: `code` is LH901 or LH902."""

    code: str
    what: str


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
        raise CallFailedError(Raised("LH901", str(late))) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a subject that raises SystemExit is data, not the end of the run
        raise CallFailedError(Raised("LH901", one_line(error))) from error
    if result is not None and not isinstance(result, torch.nn.Module):
        what = f"load returned {type(result).__name__}, but should return the model or None"
        raise CallFailedError(Raised("LH902", what))
    return (model if result is None else result).eval()


@contextmanager
def _contained(left: list[str]) -> Iterator[None]:
    """Keep warnings and the default dtype from the rest of the run."""
    import torch

    dtype = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if torch.get_default_dtype() != dtype:
            left.append("torch's default dtype")
            torch.set_default_dtype(dtype)
