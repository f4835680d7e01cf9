"""The pattern dictionaries of an adapter configuration as people write them: tails, expressions, several that fit.

PEFT matches `re.match(rf"(.*\\.)?({pattern})$", name)`, the first pattern that fits decides. Who searches, matches the
beginning alone, compares for equality, or lets the last or the longest decide reads other values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.example import Patterns
from harness.files.format import CONFIG_NAME, HEADER_KEY

_LONGEST = 400  # characters
_TABLES = ("rank_pattern", "alpha_pattern")
Rewrite = Callable[[Mapping[str, Any], list[str]], dict[str, Any]]


def rewrite_patterns(path: Path, style: Patterns) -> None:
    """Write the patterns of a LoRA, which name modules one by one, in another style that means the same."""
    if style == "names":
        return
    if path.is_dir():
        file = path / CONFIG_NAME
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(_restyled(config, "", style), indent=2, sort_keys=False), encoding="utf-8")
    else:
        _rewrite_header(path, style)


def _rewrite_header(path: Path, style: Patterns) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    text = header.get("__metadata__", {}).get(HEADER_KEY)
    if text is None:
        return
    config = json.loads(text)
    prefix = next(key.removesuffix("target_modules") for key in config if key.endswith("target_modules"))
    header["__metadata__"][HEADER_KEY] = json.dumps(_restyled(config, prefix, style), indent=2)
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[start:])


def _restyled(config: dict[str, Any], prefix: str, style: Patterns) -> dict[str, Any]:
    names = [*config[f"{prefix}target_modules"], *config.get(f"{prefix}target_parameters", ())]
    tables = {f"{prefix}{name}": config[f"{prefix}{name}"] for name in _TABLES if config.get(f"{prefix}{name}")}
    return config | {key: _STYLES[style](table, names) for key, table in tables.items()}


def _values(table: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the value of each module that the table names by an anchored, escaped pattern."""
    return {name: table[key] for name in names if (key := "^" + re.escape(name)) in table}


def _fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _tails(table: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Name each module by the shortest end of its path that no module with another value has."""
    values = _values(table, names)
    return {_tail(name, values, names): value for name, value in values.items()}


def _tail(name: str, values: Mapping[str, Any], names: list[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    own = values[name]
    return next(
        (end for end in ends if all(values.get(n) == own for n in names if _fits(end, n))), f"^{re.escape(name)}"
    )


def _regexes(table: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Name all modules of a value in one expression, behind `.*` where that lets no other module in."""
    values = _values(table, names)
    found: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        tails = dict.fromkeys(_escaped(_tail(name, values, names)) for name in values if values[name] == value)
        for some in _short(list(tails)):
            either = f"({'|'.join(some)})"
            wide = all(values.get(name) == value for name in names if _fits(f".*{either}", name))
            found[f".*{either}" if wide else either] = value
    return found


def _overlapping(table: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Name each module by its tail and, behind all of these, by its whole path with a value that is never reached."""
    hidden = {"^" + re.escape(name): 3 * value for name, value in _values(table, names).items()}
    first = _tails(table, names)
    return first | {pattern: value for pattern, value in hidden.items() if pattern not in first}


def _short(tails: list[str]) -> Iterator[list[str]]:
    """Yield the tails in as many expressions as it takes for each to be read: a long one may be slow to match."""
    some: list[str] = []
    for tail in tails:
        if some and len("|".join([*some, tail])) > _LONGEST:
            yield some
            some = []
        some.append(tail)
    yield some


def _escaped(tail: str) -> str:
    return tail if tail.startswith("^") else re.escape(tail)  # a whole path is escaped already


_STYLES: Mapping[Patterns, Rewrite] = {"tails": _tails, "regex": _regexes, "overlapping": _overlapping}
