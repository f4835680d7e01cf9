"""Which modules PEFT adapts, by the words of a configuration: targets, exceptions and the numbers of blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness.files import LoraAdapter
from harness.files.config import Budget, Patterns

_INDEX = r"(?P<idx>\d+)\."
Chosen = Callable[[str], bool]


def targeted(adapter: LoraAdapter) -> Chosen | None:
    """Return what tells whether PEFT would adapt a module of that name; None where the configuration does not say."""
    config = adapter.config
    wanted = config.get("target_modules")
    if isinstance(wanted, str) and wanted == "all-linear":
        return None
    words = config.get("layers_pattern")
    if not all(re.fullmatch(r"[\w.]*", word) for word in [words, *_names(words)] if isinstance(word, str)):
        return None
    if not isinstance(wanted, str) and not _names(wanted):
        return None
    budget = Budget()
    named = _names_of(wanted, "target_modules", budget)
    barred = _names_of(config.get("exclude_modules"), "exclude_modules", budget)
    limited = (lambda name: True) if isinstance(wanted, str) else _in_layers(config)
    return lambda name: named(name) and not barred(name) and limited(name)


def _names(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []


def _names_of(wanted: object, key: str, budget: Budget) -> Chosen:
    """Return PEFT's test of a name: a whole expression, or a list of names and endings."""
    if isinstance(wanted, str):
        patterns = Patterns({f"^(?:{wanted})": True}, key, budget)
        return lambda name: bool(patterns.get(name, False))
    listed = frozenset(_names(wanted))
    return lambda name: any(end in listed for end in _ends(name))


def _ends(name: str) -> Iterator[str]:
    """Yield a name and what stands behind each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _in_layers(config: Mapping[str, Any]) -> Chosen:
    """Return PEFT's test of `layers_to_transform`: the first number behind one of `layers_pattern`."""
    wanted, words = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted is None or wanted == []:
        return lambda name: True
    numbers = frozenset([wanted] if isinstance(wanted, int) else wanted if isinstance(wanted, list) else ())
    words = [words] if isinstance(words, str) and words else _names(words)
    starts = [rf"(?:^|.*?\.){re.escape(word)}\." for word in words] or [r".*?\.[^.]*\."]

    def inside(name: str) -> bool:
        found = next(filter(None, (re.match(start + _INDEX, name) for start in starts)), None)
        return found is not None and int(found["idx"]) in numbers

    return inside
