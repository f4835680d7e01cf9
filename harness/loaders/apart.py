"""Loaders of other people: their modules are imported only where their code runs; a child says what they declare."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from harness.errors import LoaderSpecError
from harness.isolation.facts import facts_apart
from harness.isolation.processes import can_fork
from harness.loaders.benches import spec_of
from harness.loaders.declaration import FACTS, Declaration, declaration_from, declaration_of
from harness.loaders.protocol import FUNCTION, OUTPUTS, Load, Subject
from harness.loaders.source import adapt

if TYPE_CHECKING:
    import torch

Find = Callable[[str], Callable[..., Any]]
# What checking imports anyway: taken over from the child, so that not every later process has to import it again.
_LIBRARIES = ("torch", "safetensors.torch", "diffusers", "transformers", "peft", "lycoris")
_NAMES = ("formats", "benches", "variants")


def subject_apart(spec: str, find: Find, version: str | None) -> Subject:
    """Return the loader that `find(spec)` imports, which this process does not do.

    Raises:
        LoaderSpecError: it cannot be imported, ends its process, or cannot be called as a loader.
    """
    if not can_fork():
        return subject_here(find(spec), spec, version)
    facts = _asked(spec, find)
    for library in facts["libraries"]:
        with contextlib.suppress(ImportError):
            import_module(library)
    declaration = _declaration(spec, find, facts)
    defaults = OUTPUTS if declaration.outputs else FUNCTION
    return Subject(spec, Later(spec, find, "load"), version, declaration, defaults)


def subject_here(function: Callable[..., Any], spec: str, version: str | None) -> Subject:
    """Return a function as a loader.

    Raises:
        LoaderSpecError: it cannot be called as one.
    """
    if not callable(function) or isinstance(function, type):
        raise LoaderSpecError(f"{function!r} is no loader: give a function or a string that names one")
    declaration = declaration_of(function)
    if declaration.outputs:
        return Subject(spec, cast("Load", function), version, declaration, OUTPUTS)
    return Subject(spec, adapt(function, declaration.strength_argument, spec), version, declaration)


@cache
def _imported(spec: str, find: Find) -> Subject:
    return subject_here(find(spec), spec, None)


@dataclass(frozen=True)
class Later:
    """A function of a loader, found when it is first called: in the process that calls it."""

    spec: str
    find: Find
    name: str

    def prepare(self) -> None:
        """Import the loader now."""
        _imported(self.spec, self.find)

    def __call__(self, model: torch.nn.Module, *args: Any, **keywords: Any) -> Any:
        """Call it."""
        subject = _imported(self.spec, self.find)
        function = subject.load if self.name == "load" else getattr(subject.declaration, self.name)
        return function(model, *args, **keywords)


def _asked(spec: str, find: Find) -> dict[str, Any]:
    """Have a child import the loader and return its declaration."""
    facts = facts_apart(lambda: _facts(spec, find), repr(spec), "importing", "imported")
    if "error" in facts:
        raise LoaderSpecError(facts["error"])
    return facts


def _facts(spec: str, find: Find) -> dict[str, Any]:
    before = set(sys.modules)
    try:
        said = subject_here(find(spec), spec, None).declaration
    except LoaderSpecError as error:
        return {"error": str(error)}
    return {
        **{name: None if (names := getattr(said, name)) is None else sorted(map(_named, names)) for name in _NAMES},
        "unload": said.unload is not None,
        "set_strength": said.set_strength is not None,
        "strength_argument": said.strength_argument,
        "uniform": sorted(said.uniform),
        "modules": said.modules,
        "quantises": said.quantises,
        "also": sorted(said.also),
        "outputs": said.outputs,
        "dtypes": sorted(said.dtypes),
        "file_dtypes": sorted(said.file_dtypes),
        "gpu": said.gpu,
        "unsupported": [[list(names), reason] for names, reason in said.unsupported.items()],
        "libraries": [name for name in _LIBRARIES if name in sys.modules and name not in before],
    }


def _named(what: str | Callable[..., object]) -> str:
    return what if isinstance(what, str) else spec_of(what)


def _declaration(spec: str, find: Find, facts: dict[str, Any]) -> Declaration:
    return replace(
        declaration_from({name: facts[name] for name in FACTS}),
        unload=Later(spec, find, "unload") if facts["unload"] else None,
        set_strength=Later(spec, find, "set_strength") if facts["set_strength"] else None,
    )
