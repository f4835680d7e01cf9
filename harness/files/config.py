"""The adapter configuration (PEFT's LoraConfig as JSON): which rank and alpha it gives to a module."""

from __future__ import annotations

import gc
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harness.text import printable

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

_META = frozenset("\\^$*+?{}[]|()")
_SECONDS = 0.3
_LONGEST_REGEX = 500
_MOST_UNROLLED = 10_000  # `regex` writes out every repetition that must be there: 10,000 of them cost 5 ms and 3 MB
_MOST_CHARACTERS = 1_000_000
_REPEATS = tuple(
    vars(_parser)[name] for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if name in vars(_parser)
)
_MATCHED = ("target_modules", "exclude_modules", "layers_pattern")


class ConfigError(ValueError):
    """A configuration value that cannot be used; `key` names it, `code` what is broken: alpha, rank or a pattern."""

    def __init__(self, key: str, problem: str, code: str = "LH727") -> None:
        self.key, self.code = key, code
        super().__init__(problem)


class PatternError(ConfigError):
    """A pattern that cannot be matched in bounded time; `key` names where it stands, `pattern` is the offender."""

    def __init__(self, key: str, pattern: str, problem: str) -> None:
        self.pattern = pattern
        super().__init__(f"{key}: pattern {printable(pattern, 60)}", problem)


class Budget:
    """The seconds of computing that all patterns of one file may take together; a loaded machine takes none away."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self.left = seconds

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Count what happens inside.

        Raises:
            TimeoutError: nothing was left before.
        """
        if self.left <= 0:
            raise TimeoutError
        collecting = gc.isenabled()
        gc.disable()  # one collection of all that a large process holds takes as long as every pattern may
        start = time.thread_time()
        try:
            yield
        finally:
            self.left -= time.thread_time() - start
            if collecting:
                gc.enable()


Dots = tuple[int, ...]  # the places of the `.` wildcard


class _Plain:
    """Patterns without repetition by length, places of wildcards, and text: a name is found without trying each."""

    def __init__(self) -> None:
        self._found: dict[int, dict[Dots, dict[tuple[str, bool], tuple[int, Any]]]] = {}

    def add(self, rank: int, text: str, dots: Dots, anchored: bool, value: Any) -> None:
        same = self._found.setdefault(len(text), {}).setdefault(dots, {})
        same.setdefault((text, anchored), (rank, value))

    def hits(self, name: str) -> Iterator[tuple[int, Any]]:
        """Yield (rank, value) of every pattern that fits the whole name or what stands behind one of its dots."""
        for start in (0, *(place + 1 for place, character in enumerate(name) if character == ".")):
            for dots, same in self._found.get(len(name) - start, {}).items():
                text = _dotted(name[start:], dots)
                for anchored in (False, True) if start == 0 else (False,):
                    if (text, anchored) in same:
                        yield same[text, anchored]


class Patterns:
    """A pattern dictionary of an adapter configuration: the first pattern that matches a module name decides.

    The meaning is PEFT's `re.match(rf"(.*\\.)?({pattern})$", name)`. Names, escaped characters, `^`, `$` and the `.`
    wildcard are matched here; a pattern with any other metacharacter goes through the `regex` package under a time
    limit, because it comes from a file and Python's own engine cannot be stopped. It is measured before it is compiled,
    and may hold nothing that Python's `re` does not know, such as recursion. `key` names the dictionary in messages.
    """

    def __init__(self, patterns: Mapping[str, Any], key: str = "pattern", budget: Budget | None = None) -> None:
        if (length := sum(map(len, patterns))) > _MOST_CHARACTERS:
            raise ConfigError(key, f"holds {length:,} characters of patterns, at most {_MOST_CHARACTERS:,} are read")
        self._key, self._budget = key, budget or Budget()
        self._plain, self._any = _Plain(), bool(patterns)
        self._regexes: list[tuple[int, str, Any]] = []
        self._compiled: dict[str, Any] = {}
        self._slow: str | None = None
        for rank, (pattern, value) in enumerate(patterns.items()):
            if plain := _plain(pattern):
                self._plain.add(rank, *plain, value)
            else:
                self._regexes.append((rank, pattern, value))

    def get(self, name: str, default: Any) -> Any:
        """Return the value of the first pattern that matches `name`, or `default`.

        Raises:
            ConfigError: the patterns are too many to be tried.
            PatternError: a pattern is no valid regular expression, too large, or takes too long.
        """
        if not self._any:
            return default
        try:
            with self._budget.spent():
                rank, value = min(self._plain.hits(name), key=lambda hit: hit[0], default=(math.inf, default))
        except TimeoutError:
            raise self._too_long(self._slow) from None
        return next((found for at, pattern, found in self._regexes if at < rank and self._fits(pattern, name)), value)

    def _fits(self, pattern: str, name: str) -> bool:
        import regex

        try:
            with self._budget.spent():
                if pattern not in self._compiled:
                    self._compiled[pattern] = self._compile(pattern)
                return self._compiled[pattern].match(name, timeout=self._budget.left) is not None
        except TimeoutError:
            self._budget.left, self._slow = 0.0, pattern
            raise self._too_long(pattern) from None
        except (regex.error, re.error, RecursionError, OverflowError, MemoryError) as error:
            what = f"is not a valid regular expression ({printable(error, 100)})"
            raise PatternError(self._key, pattern, what) from None

    def _too_long(self, pattern: str | None) -> ConfigError:
        if pattern is None:
            return ConfigError(self._key, "holds patterns that take too long to match")
        return PatternError(self._key, pattern, "takes too long to match: a plain module name is enough")

    def _compile(self, pattern: str) -> Any:
        import regex

        if len(pattern) > _LONGEST_REGEX:
            what = f"is a regular expression of {len(pattern):,} characters, at most {_LONGEST_REGEX} are safe"
            raise PatternError(self._key, pattern, what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of spellings that will mean something else one day
            whole = rf"(.*\.)?({pattern})$"
            if (size := _unrolled(_parser.parse(whole))) > _MOST_UNROLLED:
                what = f"repeats itself to {size:,} pieces, at most {_MOST_UNROLLED:,} are safe"
                raise PatternError(self._key, pattern, what)
            return regex.compile(whole, cache_pattern=False)


def _unrolled(node: Any) -> int:
    """Return the number of pieces of a parsed expression when every repetition that must be there is written out."""
    if not isinstance(node, (_parser.SubPattern, tuple, list)):
        return 0
    if isinstance(node, tuple) and any(node[0] is repeat for repeat in _REPEATS):  # the constants equal plain numbers
        least, _, inner = node[1]
        return max(int(least), 2) * _unrolled(inner)  # `regex` compiles twice over what may repeat
    return 1 + sum(_unrolled(part) for part in node)


def _dotted(text: str, dots: Dots) -> str:
    """Return `text` with `.` at these places."""
    if not dots:
        return text
    characters = list(text)
    for place in dots:
        characters[place] = "."
    return "".join(characters)


def _plain(pattern: str) -> tuple[str, Dots, bool] | None:
    """Return text, places of wildcards and whether it is anchored; None for a pattern with any other metacharacter."""
    anchored = pattern.startswith("^")
    body = pattern.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    characters: list[str] = []
    dots: list[int] = []
    at = 0
    while at < len(body):
        escaped = body[at] == "\\" and at + 1 < len(body) and not body[at + 1].isalnum()
        if not escaped and body[at] in _META:
            return None
        at += escaped
        if body[at] == "." and not escaped:
            dots.append(len(characters))
        characters.append(body[at])
        at += 1
    return "".join(characters), tuple(dots), anchored


PAIRED = frozenset({"lora", "loha", "lokr"})
"""PEFT's methods whose tensors are parts of a low-rank update."""


LORA_OPTIONS: Mapping[str, str] = {
    "kasa_config": "kasa", "monteclora_config": "monteclora", "velora_config": "velora", "use_bdlora": "bdlora",
    "use_qalora": "qalora",
}  # fmt: skip
"""Options of PEFT's LoRA that make another update of the pair, and what such a file is called."""

LORA_METHODS = frozenset({"adalora", *LORA_OPTIONS.values()})
"""Methods whose pairs have a rank and an alpha, and an update that is not B @ A."""


def method_of(raw: Mapping[str, Any]) -> str:
    """Return PEFT's method in lower case, `lora` where a configuration names none."""
    kind = raw.get("peft_type")
    kind = kind.lower() if isinstance(kind, str) and kind else "lora"
    return next((name for key, name in LORA_OPTIONS.items() if raw.get(key)), kind) if kind == "lora" else kind


def pattern_problems(raw: Mapping[str, Any], names: Iterable[str], budget: Budget) -> Iterator[ConfigError]:
    """Yield the patterns that choose modules in PEFT and cannot be matched against `names`; nothing here uses them."""
    for key in _MATCHED:
        if budget.left <= 0:
            return
        value = raw.get(key)
        chosen = [value] if isinstance(value, str) else value if key == "layers_pattern" else ()
        if not isinstance(chosen, list | tuple):
            continue
        try:
            patterns = Patterns({pattern: None for pattern in chosen if isinstance(pattern, str)}, key, budget)
            for name in names:
                patterns.get(name, None)
        except ConfigError as error:
            yield error


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
    def parse(cls, raw: Mapping[str, Any], budget: Budget | None = None) -> AdapterConfig:
        """Read the fields that decide the scale; `budget` is what its patterns share with others of the file.

        Raises:
            ConfigError: a field has the wrong type.
        """
        alpha_key = "lora_alpha" if "lora_alpha" in raw or raw.get("peft_type", "LORA") == "LORA" else "alpha"
        rank, budget = raw.get("r", DEFAULT_RANK), budget or Budget()
        if not _is_whole(rank):
            raise ConfigError("r", f"is {rank!r}, a whole number is needed", "LH726")
        return cls(
            rank=rank,
            alpha=_number(alpha_key, raw.get(alpha_key, DEFAULT_ALPHA)),
            rslora=bool(raw.get("use_rslora", False)),
            ranks=_patterns("rank_pattern", raw, budget),
            alphas=_patterns("alpha_pattern", raw, budget),
        )

    def of(self, name: str) -> tuple[int, float]:
        """Return (rank, alpha) that PEFT uses for the module `name` (without `base_model.model.`).

        Raises:
            ConfigError: a pattern or its value cannot be used.
        """
        rank = self.ranks.get(name, self.rank)
        if not _is_whole(rank):
            raise ConfigError("rank_pattern", f"is {rank!r} for {name}, a whole number is needed", "LH726")
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
        raise ConfigError(key, f"is {value!r}, a number is needed", "LH705")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(key, "is too large for a number", "LH705") from None


def _patterns(key: str, raw: Mapping[str, Any], budget: Budget) -> Patterns:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(key, f"is {value!r}, an object of module name to number is needed")
    return Patterns(value, key, budget)


def changing_init(config: Mapping[str, Any]) -> str | None:
    """Return how PEFT began, where that changes the base too, so that B @ A is no difference to it."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and re.match(r"pissa|olora|corda|loftq|lora_ga", init, re.IGNORECASE) else None
