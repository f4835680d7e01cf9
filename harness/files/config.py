"""The adapter configuration (PEFT's LoraConfig as JSON): which rank and alpha it gives to a module."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.text import printable

_META = frozenset("\\^$*+?{}[]|()")
_BUDGET_SECONDS = 0.5
_LONGEST_REGEX = 500


class ConfigError(ValueError):
    """A configuration value that cannot be used; `key` names it."""

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        super().__init__(problem)


class PatternError(ConfigError):
    """A pattern that cannot be matched in bounded time; `pattern` is the offender."""

    def __init__(self, pattern: str, problem: str) -> None:
        self.pattern = pattern
        super().__init__(f"pattern {printable(pattern, 60)}", problem)


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
        import regex

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


DEFAULT_RANK = DEFAULT_ALPHA = 8  # peft.LoraConfig


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and alpha per module, with PEFT's defaults and pattern semantics."""

    rank: Any
    alpha: float
    rslora: bool
    ranks: Patterns
    alphas: Patterns

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """Read the fields that decide the scale.

        Raises:
            ConfigError: a field has the wrong type.
        """
        alpha_key = "lora_alpha" if "lora_alpha" in raw or raw.get("peft_type", "LORA") == "LORA" else "alpha"
        rank = raw.get("r", DEFAULT_RANK)
        if not _is_whole(rank):
            raise ConfigError("r", f"is {rank!r}, a whole number is needed")
        return cls(
            rank=rank,
            alpha=_number(alpha_key, raw.get(alpha_key, DEFAULT_ALPHA)),
            rslora=bool(raw.get("use_rslora", False)),
            ranks=_patterns("rank_pattern", raw),
            alphas=_patterns("alpha_pattern", raw),
        )

    def of(self, name: str) -> tuple[int, float]:
        """Return (rank, alpha) that PEFT uses for the module `name` (without `base_model.model.`).

        Raises:
            ConfigError: a pattern or its value cannot be used.
        """
        rank = self.ranks.get(name, self.rank)
        if not _is_whole(rank):
            raise ConfigError("rank_pattern", f"is {rank!r} for {name}, a whole number is needed")
        return rank, _number("alpha_pattern", self.alphas.get(name, self.alpha))


def build(ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool) -> dict[str, Any]:
    """Return the configuration that gives every module its rank and alpha; the most common values are the defaults.

    Pattern keys are anchored and escaped, so that `to_q` never reaches `attn.to_q` nor `0.x` `10.x`.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _shortest(alpha),
        "rank_pattern": {anchored(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {anchored(name): _shortest(value) for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_rslora": rslora,
    }


def anchored(name: str) -> str:
    """Return a pattern that matches `name` and no other module."""
    return "^" + re.escape(name)


def _shortest(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(key, f"is {value!r}, a number is needed")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(key, "is too large for a number") from None


def _patterns(key: str, raw: Mapping[str, Any]) -> Patterns:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(key, f"is {value!r}, an object of module name to number is needed")
    return Patterns(value)
