"""A string in, a function out: import `package.module:callable` or `path/to/file.py:callable`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.errors import LoaderSpecError, one_line
from harness.loaders.protocol import Load

if TYPE_CHECKING:
    import torch

_numbers = itertools.count()


WANTED = "load(model, lora, *, strength=1.0)"


@dataclass(frozen=True)
class FunctionSpec:
    """What a function is imported as, how it is called, and the name that it is likely to have."""

    what: str
    how: str
    name: str


A_LOADER = FunctionSpec("a loader", f"a function {WANTED}", "load")
A_BENCH = FunctionSpec("a bench", "a function that builds a model", "make")


def import_callable(spec: str, wanted: FunctionSpec = A_LOADER) -> Callable[..., Any]:
    """Return the function that `package.module:callable` or `path/to/file.py:callable` names.

    Raises:
        LoaderSpecError: no such file or module, it fails when imported, no such attribute, or it is not a function.
    """
    where, _, attribute = spec.rpartition(":")
    if not where or not attribute:
        name = wanted.name
        raise LoaderSpecError(f"{spec!r} names no function; write {spec.strip(':')}:{name} when `{name}` is its name")
    if is_file(where):
        path = Path(where)
        function = _attribute(_module_from_file(path, spec), attribute, spec, wanted)
        return _with_folder(function, str(path.resolve().parent))
    function = _attribute(_module_from_name(where, spec), attribute, spec, wanted)
    folder = str(Path.cwd())
    return function if {"", folder} & set(sys.path) else _with_folder(function, folder)


def is_file(where: str) -> bool:
    """Tell a path from a module name."""
    return where.endswith(".py") or "/" in where or "\\" in where


def _module_from_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise LoaderSpecError(f"{spec!r}: there is no file {path.absolute()}")
    name = f"_lora_harness_file_{next(_numbers)}_{path.stem}"
    description = importlib.util.spec_from_file_location(name, path.resolve())
    if description is None or description.loader is None:
        raise LoaderSpecError(f"{spec!r}: {path} is no Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        with on_path(str(path.resolve().parent)), _import_errors(spec, str(path)):
            description.loader.exec_module(module)
    except LoaderSpecError:
        del sys.modules[name]
        raise
    return module


def _module_from_name(name: str, spec: str) -> ModuleType:
    importlib.invalidate_caches()  # it may be younger than the listing Python keeps of its folder
    with on_path(str(Path.cwd())), _import_errors(spec, name):
        return importlib.import_module(name)


def _attribute(module: ModuleType, dotted: str, spec: str, wanted: FunctionSpec) -> Callable[..., Any]:
    try:
        found = functools.reduce(getattr, dotted.split("."), module)
    except AttributeError:
        own = [name for name, value in vars(module).items() if _is_own_function(value, module)]
        hint = f"; it defines {', '.join(own[:8])}" if own else ""
        raise LoaderSpecError(f"{spec!r}: {_shown(module)} has no {dotted!r}{hint}") from None
    if isinstance(found, type):
        raise LoaderSpecError(f"{spec!r} is a class; {wanted.what} is {wanted.how}")
    if not callable(found):
        raise LoaderSpecError(f"{spec!r} is {type(found).__name__}, not {wanted.how}")
    return found


def _is_own_function(value: object, module: ModuleType) -> bool:
    return callable(value) and not isinstance(value, type) and getattr(value, "__module__", None) == module.__name__


def _shown(module: ModuleType) -> str:
    return module.__file__ or module.__name__ if module.__name__.startswith("_lora_harness_file_") else module.__name__


@contextlib.contextmanager
def on_path(folder: str) -> Iterator[None]:
    """Put `folder` first on `sys.path` inside the block, and take this one entry away afterwards."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


@contextlib.contextmanager
def _import_errors(spec: str, what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise LoaderSpecError(f"{spec!r}: cannot import {what}: {error}") from error
    except SyntaxError as error:
        raise LoaderSpecError(f"{spec!r}: {what} is not valid Python: {error.msg}, line {error.lineno}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a script without a main guard must not end the run
        raise LoaderSpecError(f"{spec!r}: importing {what} raises {one_line(error)}") from error


def _with_folder(function: Callable[..., Any], folder: str) -> Callable[..., Any]:
    """Let `function` import its neighbours when it is called, not only when its file is."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with on_path(folder):
            return function(*args, **kwargs)

    return call


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def adapt(function: Callable[..., Any], strength_argument: str | None, spec: str) -> Load:
    """Return `function` itself when it takes the keyword `strength`, else a call as it declared: by name, or without.

    Raises:
        LoaderSpecError: it cannot be called with a model, a path and a strength.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled functions may have no signature: the first call will tell
        return function
    if strength_argument is None:
        _check_rest(signature, None, f"{spec!r} is {_signature(function)}")
        return _without(function)
    parameters = list(signature.parameters.values())
    keyword = _strength_keyword(parameters, strength_argument)
    if keyword is None:
        raise LoaderSpecError(_no_strength(function, parameters, strength_argument, spec))
    _check_rest(signature, keyword, f"{spec!r} is {_signature(function)}")
    return function if keyword == "strength" else _under_name(function, keyword)


def _strength_keyword(parameters: list[inspect.Parameter], declared: str) -> str | None:
    named = {parameter.name for parameter in parameters if parameter.kind in _NAMED}
    if "strength" in named:
        return "strength"
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return declared if declared in named or takes_any else None


def _check_rest(signature: inspect.Signature, keyword: str | None, what: str) -> None:
    try:
        given = signature.bind_partial(None, None, **({keyword: 1.0} if keyword else {})).arguments
    except TypeError:
        raise LoaderSpecError(f"{what}; it must take a model and a path: {WANTED}") from None
    rest = [p for p in signature.parameters.values() if p.name not in given and p.kind not in _ANY]
    if missing := ", ".join(p.name for p in rest if p.default is p.empty):
        raise LoaderSpecError(f"{what}; give {missing} a default, it is called as {WANTED}")


def _no_strength(function: Callable[..., Any], parameters: list[inspect.Parameter], declared: str, spec: str) -> str:
    start = f"{spec!r} is {_signature(function)}, which takes no keyword {declared!r}; write {WANTED}"
    others = [parameter.name for parameter in parameters[2:] if parameter.kind in _NAMED]
    return f"{start}, or declare @loader(strength_argument={others[0]!r})" if others else start


def _signature(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return f"{name}{inspect.signature(function)}"


def _without(function: Callable[..., Any]) -> Load:
    @functools.wraps(function)
    def load(model: torch.nn.Module, lora: Path, **given: float) -> torch.nn.Module | None:
        result: torch.nn.Module | None = function(model, lora)
        return result

    return load


def _under_name(function: Callable[..., Any], keyword: str) -> Load:
    @functools.wraps(function)
    def load(model: torch.nn.Module, lora: Path, **given: float) -> torch.nn.Module | None:
        named = {keyword: given["strength"]} if given else {}
        result: torch.nn.Module | None = function(model, lora, **named)
        return result

    return load
