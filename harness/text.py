"""Text that came out of a file: bounded JSON, and names, metadata and messages that are safe to show."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

MAX_JSON_CHARACTERS = 8_000_000
SHOWN = 120


def printable(text: object, limit: int = SHOWN) -> str:
    """Return `text` on one line without control, format and bidirectional characters, cut to `limit` characters.

    Escape sequences and right-to-left overrides in a tensor name or in metadata would otherwise reach the terminal.
    """
    raw = str(text)
    if len(raw) <= limit and raw.isprintable():
        return raw
    shown = "".join(_shown(character) for character in raw[: limit + 1])
    return shown[: limit - 1] + "…" if len(raw) > limit else shown


def count(number: int, noun: str) -> str:
    """Return `1 key`, `1,200 keys`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def is_printable(text: str) -> bool:
    """Tell whether `text` can be shown as it is."""
    return text.isprintable() or all(_shown(character) == character for character in text)


def _shown(character: str) -> str:
    category = unicodedata.category(character)
    return "\N{REPLACEMENT CHARACTER}" if category[0] == "C" or category in ("Zl", "Zp") else character


def parse_json(text: str | bytes, *, limit: int = MAX_JSON_CHARACTERS) -> Any:
    """Parse JSON that a stranger wrote.

    Raises:
        ValueError: not JSON, longer than `limit`, nested too deeply, or with a number too long to read.
    """
    if len(text) > limit:
        raise ValueError(f"{len(text):,} characters of JSON, at most {limit:,} are read")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at line {error.lineno} column {error.colno})") from None
    except UnicodeDecodeError:
        raise ValueError("not valid JSON (the text is not UTF-8)") from None
    except (ValueError, MemoryError) as error:
        raise ValueError(f"a value in the JSON cannot be read ({printable(error, 60)})") from None


_KEEP = frozenset("\n\t")


def plain(text: str, limit: int | None = None) -> str:
    """Return `text` with control, format and bidi characters shown as escapes, cut to `limit` characters.

    An escape sequence in a file's metadata must not move the cursor, colour the terminal or reorder a line.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(char if char in _KEEP or not _is_control(char) else _escaped(char) for char in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
