"""PEFT's `rank_pattern` and `alpha_pattern`, matched as PEFT does but never by an unbounded regex engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_META = frozenset("\\^$*+?{}[]|()")
_BUDGET_SECONDS = 0.5
_LONGEST_REGEX = 500


class PatternError(ValueError):
    """A pattern that cannot be matched in bounded time; `pattern` is the offender."""

    def __init__(self, pattern: str, problem: str) -> None:
        self.pattern = pattern
        super().__init__(problem)


@dataclass(frozen=True, slots=True)
class _Plain:
    """A pattern without repetition: one character or None (the `.` wildcard) per position."""

    rank: int
    characters: tuple[str | None, ...]
    anchored: bool
    value: Any

    def fits(self, text: str) -> bool:
        return all(wanted in (None, found) for wanted, found in zip(self.characters, text, strict=True))


class Patterns:
    """A pattern dictionary of an adapter configuration: the first pattern that matches a module name decides.

    The meaning is PEFT's `re.match(rf"(.*\\.)?({pattern})$", name)`. Names, escaped characters, `^`, `$` and the `.`
    wildcard are matched here; a pattern with any other metacharacter goes through the `regex` package under a time
    limit, because it comes from a file and Python's own engine cannot be stopped.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._plain: dict[int, list[_Plain]] = {}
        self._regexes: list[tuple[int, str, Any]] = []
        self._left = _BUDGET_SECONDS
        for rank, (pattern, value) in enumerate(patterns.items()):
            plain = _plain(rank, pattern, value)
            if plain:
                self._plain.setdefault(len(plain.characters), []).append(plain)
            else:
                self._regexes.append((rank, pattern, value))

    def get(self, name: str, default: Any) -> Any:
        """Return the value of the first pattern that matches `name`, or `default`.

        Raises:
            PatternError: a pattern is no valid regular expression or takes too long.
        """
        if not self._plain and not self._regexes:
            return default
        found = min(self._plain_hits(name), key=lambda plain: plain.rank, default=None)
        for rank, pattern, value in self._regexes:
            if found and found.rank < rank:
                break
            if self._regex_fits(pattern, name):
                return value
        return found.value if found else default

    def _plain_hits(self, name: str) -> Iterator[_Plain]:
        for start in (0, *(place + 1 for place, character in enumerate(name) if character == ".")):
            for plain in self._plain.get(len(name) - start, ()):
                if (start == 0 or not plain.anchored) and plain.fits(name[start:]):
                    yield plain

    def _regex_fits(self, pattern: str, name: str) -> bool:
        try:
            regex = import_module("regex")
        except ImportError:
            raise PatternError(pattern, "is a regular expression: install `regex` to have it matched safely") from None
        if len(pattern) > _LONGEST_REGEX:
            raise PatternError(pattern, f"is a regular expression of {len(pattern)} characters, too long to be safe")
        start = time.perf_counter()
        try:
            found = regex.match(rf"(.*\.)?({pattern})$", name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise PatternError(pattern, "takes too long to match: a plain module name is enough") from None
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise PatternError(pattern, f"is not a valid regular expression ({error})") from None
        finally:
            self._left -= time.perf_counter() - start
        return found is not None


def _plain(rank: int, pattern: str, value: Any) -> _Plain | None:
    anchored = pattern.startswith("^")
    body = pattern.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    characters: list[str | None] = []
    at = 0
    while at < len(body):
        escaped = body[at] == "\\" and at + 1 < len(body) and not body[at + 1].isalnum()
        if not escaped and body[at] in _META:
            return None
        at += escaped
        characters.append(None if body[at] == "." and not escaped else body[at])
        at += 1
    return _Plain(rank, tuple(characters), anchored, value)
