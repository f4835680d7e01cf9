"""Make every accepted signature answer to `load(model, lora, *, strength=1.0)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LoaderSpecError
from harness.loaders.protocol import Load

if TYPE_CHECKING:
    import torch

WANTED = "load(model, lora, *, strength=1.0)"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def adapt(function: Callable[..., Any], strength_argument: str, spec: str) -> Load:
    """Return `function` itself when it takes the keyword `strength`, else a call under the name it declared.

    Raises:
        LoaderSpecError: it cannot be called with a model, a path and a strength.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled functions may have no signature: the first call will tell
        return function
    keyword = _strength_keyword(parameters, strength_argument)
    if keyword is None:
        raise LoaderSpecError(_no_strength(function, parameters, strength_argument, spec))
    _check_rest(function, parameters, keyword, spec)
    return function if keyword == "strength" else _under_name(function, keyword)


def _strength_keyword(parameters: list[inspect.Parameter], declared: str) -> str | None:
    named = {parameter.name for parameter in parameters if parameter.kind in _NAMED}
    if "strength" in named:
        return "strength"
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return declared if declared in named or takes_any else None


def _check_rest(function: Callable[..., Any], parameters: list[inspect.Parameter], keyword: str, spec: str) -> None:
    rest = [parameter for parameter in parameters if parameter.name != keyword]
    positional = [parameter for parameter in rest if parameter.kind in _BY_POSITION]
    variadic = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in rest)
    if len(positional) < 2 and not variadic:
        raise LoaderSpecError(f"{spec!r} is {_shown(function)}; it must take a model and a path: {WANTED}")
    plain = [parameter for parameter in rest if parameter not in positional[:2] and _is_required(parameter)]
    if plain:
        names = ", ".join(parameter.name for parameter in plain)
        raise LoaderSpecError(f"{spec!r} is {_shown(function)}; give {names} a default, it is called as {WANTED}")


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in {*_NAMED, *_BY_POSITION}


def _no_strength(function: Callable[..., Any], parameters: list[inspect.Parameter], declared: str, spec: str) -> str:
    start = f"{spec!r} is {_shown(function)}, which takes no keyword {declared!r}; write {WANTED}"
    others = [parameter.name for parameter in parameters[2:] if parameter.kind in _NAMED]
    return f"{start}, or declare @loader(strength_argument={others[0]!r})" if others else start


def _shown(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return f"{name}{inspect.signature(function)}"


def _under_name(function: Callable[..., Any], keyword: str) -> Load:
    @functools.wraps(function)
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module | None:
        result: torch.nn.Module | None = function(model, lora, **{keyword: strength})
        return result

    return load
