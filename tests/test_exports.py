"""What stands in a public signature can itself be imported from a public package."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGES = tuple(
    import_module(name)
    for name in (
        "harness", "harness.checks", "harness.doctor", "harness.files", "harness.images", "harness.law",
        "harness.verdict",
    )
)  # fmt: skip
PUBLIC = {package.__name__: getattr(package, "__all__", []) for package in PACKAGES}
EXPORTED = {id(getattr(package, name)) for package in PACKAGES for name in PUBLIC[package.__name__]}
EVERY = [(package, name) for package, names in PUBLIC.items() for name in names]


@functools.cache
def names_in(module: ModuleType) -> dict[str, Any]:
    """Return the names of a module, with those that it imports for type checkers only."""
    found = dict(vars(module))
    for block in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(block.body, []), str(module.__file__), "exec"), found)
    return found


def hints(thing: Any, module: str) -> Iterator[Any]:
    names = names_in(sys.modules[module])
    for hint in typing.get_type_hints(thing, names, names).values():
        yield from parts(hint)


def parts(hint: Any) -> Iterator[Any]:
    """Yield a hint, or all that it is made of: `Callable[[A], list[B]]` is A and B, a type variable its bound."""
    hint = getattr(hint, "__bound__", None) or hint
    inner = [each for arg in typing.get_args(hint) for each in (arg if isinstance(arg, list) else [arg])]
    if not inner:
        yield hint
    for each in inner:
        yield from parts(each)


def raised(thing: Any, module: str) -> Iterator[Any]:
    """Yield the exceptions that a docstring names under `Raises:`."""
    _, _, section = (inspect.getdoc(thing) or "").partition("Raises:\n")
    known = names_in(sys.modules[module]) | vars(import_module("harness.errors"))
    yield from (known[name] for name in re.findall(r"^ +(\w+): ", section, re.M) if name in known)


def callables(thing: Any) -> Iterator[Callable[..., Any]]:
    """Yield what is public of a class or function: itself, its methods, what its properties read."""
    if not inspect.isclass(thing):
        yield inspect.unwrap(thing)
        return
    for name, member in vars(thing).items():
        member = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
        if inspect.isfunction(member) and (not name.startswith("_") or name == "__init__"):
            yield member


def signature(thing: Any) -> Iterator[Any]:
    module = thing.__module__
    for function in callables(thing):
        if not dataclasses.is_dataclass(thing) or function.__name__ != "__init__":
            yield from hints(function, function.__module__)
            yield from raised(function, function.__module__)
    if inspect.isclass(thing):
        public = {name for name in inspect.get_annotations(thing) if not name.startswith("_")}
        names = names_in(sys.modules[module])
        for name, hint in typing.get_type_hints(thing, names, names).items():
            yield from parts(hint) if name in public else ()


@pytest.mark.parametrize(("package", "name"), EVERY)
def test_a_public_signature_names_public_types_only(package: str, name: str) -> None:
    thing = getattr(sys.modules[package], name)
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        return
    ours = [part for part in signature(thing) if str(getattr(part, "__module__", "")).startswith("harness.")]
    missing = {f"{part.__module__}.{part.__qualname__}" for part in ours if id(part) not in EXPORTED}
    assert not missing
