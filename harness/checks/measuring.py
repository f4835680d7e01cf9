"""What answers a trial where the subject's code runs: the work is done, and what went wrong in it is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from harness.benches.given import take_benches
from harness.checks.engine import answer_outputs
from harness.checks.experts import UnreadableExpertsError
from harness.checks.work import Order, Work
from harness.errors import UserError, one_line
from harness.isolation.calls import CallFailedError, Raised
from harness.isolation.limits import TimeLimitExceeded
from harness.isolation.subject import Part
from harness.loaders.pinned import subject_there
from harness.loaders.protocol import Subject
from harness.measure.effective import MissingModuleError


def answer(subject: Subject, order: dict[str, Any], on_part: Part) -> dict[str, Any]:
    """Do the `order`, the fields of an `Order`; return what was measured, or under `raised` what went wrong.

    Before each step and the measuring, `on_part` hears that the one before has ended.
    """
    todo = Order(**order)
    if subject.outputs:
        return answer_outputs(subject.outputs, todo.bench, todo.steps[0], todo.seconds)
    try:
        work = Work.begun(subject, todo)
    except UserError as error:  # elsewhere the bench may be no model of the release
        return {"raised": asdict(Raised("LH902", str(error)))}
    try:
        for step in todo.steps:
            on_part("step")
            work.take(*step)
        on_part("measure")
        return work.measured()
    except (Exception, TimeLimitExceeded) as error:
        return {"raised": asdict(_raised(error))}


def answering(subject: Subject) -> Callable[[Any, Part], Any]:
    """Return what answers for `subject`."""
    return partial(answer, subject)


def served(told: dict[str, Any]) -> Callable[[Any, Part], Any]:
    """Return what answers, in another interpreter, for the live loader of a pinned string.

    Raises:
        LoaderSpecError: another release would be measured.
    """
    take_benches(told["benches"])
    return answering(subject_there(told))


def _raised(error: BaseException) -> Raised:
    """Say how a call, or the measuring of the model that it left, went wrong."""
    if isinstance(error, CallFailedError):
        return error.raised
    if isinstance(error, MissingModuleError):
        return Raised("LH902", f"the loaded model has no module {error}", loaded=True)
    if isinstance(error, UnreadableExpertsError):
        return Raised("LH902", str(error), loaded=True)
    if isinstance(error, TimeLimitExceeded):
        return Raised("LH901", f"the loaded model does not answer: {error}", timed_out=True, loaded=True)
    return Raised("LH902", f"the loaded model does not run: {one_line(error)}", loaded=True)
