"""The steps of a trial: what is done to a model between building and measuring it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.loaders.protocol import Subject

if TYPE_CHECKING:
    import torch

File = Literal["example", "copy", "other"]
Call = Callable[["torch.nn.Module"], object]


@dataclass(frozen=True)
class Step:
    """One call of the subject: load a file of the trial, undo the last load, or set the strength of what is loaded.

    `rebuild` goes on with a new model. `times` multiplies the strength of the example, or the layers of that model.
    `file`: the example's own, a copy of it, or the other example's.
    """

    kind: Literal["load", "unload", "set_strength", "rebuild"]
    times: float = 1.0
    file: File = "example"

    def call(self, subject: Subject, file: Callable[[File], Path], strength: float) -> Call:
        """Return the call to make on the model; what the subject does not declare does nothing."""
        wanted = self.times * strength
        if self.kind == "load":
            path = file(self.file)
            return lambda model: subject.load(model, path, strength=wanted)
        declared = subject.declaration
        if self.kind == "unload":
            return declared.unload or _nothing
        set_strength = declared.set_strength
        return (lambda model: set_strength(model, wanted)) if set_strength else _nothing


def load(times: float = 1.0, file: File = "example") -> Step:
    """Return the step that loads a file."""
    return Step("load", times, file)


def set_strength(times: float) -> Step:
    """Return the step that sets the strength without loading again."""
    return Step("set_strength", times)


def rebuild(times: float) -> Step:
    """Return the step that goes on with a new model, its layers multiplied by `times`, a power of two."""
    return Step("rebuild", times)


UNLOAD = Step("unload")


def _nothing(model: torch.nn.Module) -> None:
    return None
