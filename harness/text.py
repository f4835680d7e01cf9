"""Text that came out of a file: bounded JSON, and names, metadata and messages that are safe to show."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
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
    shown = "".join("\N{REPLACEMENT CHARACTER}" if _is_hidden(char) else char for char in raw[: limit + 1])
    return shown[: limit - 1] + "…" if len(raw) > limit else shown


def elided(text: str, limit: int) -> str:
    """Return `text` on one line, its middle left out where it is longer than `limit` characters.

    Names of loaders differ at both ends: a path begins alike and ends in the function.
    """
    whole = on_one_line(text)
    kept = max(limit - 1, 2)
    return whole if len(whole) <= limit else f"{whole[: kept // 2]}…{whole[len(whole) - (kept - kept // 2) :]}"


def count(number: int, noun: str) -> str:
    """Return `1 key`, `1,200 keys`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_of(names: Sequence[str]) -> str:
    """Return the first name, safe to print, and a sign that there are more."""
    return printable(names[0], 80) + (", …" if len(names) > 1 else "")


def is_printable(text: str) -> bool:
    """Tell whether `text` can be shown as it is."""
    return text.isprintable() or not any(map(_is_hidden, text))


def _is_hidden(char: str) -> bool:
    """Tell whether `char` is a control, format or bidi character, or separates lines or paragraphs."""
    category = unicodedata.category(char)
    return category[0] == "C" or category in ("Zl", "Zp")


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


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file of this package."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(path.read_text(encoding="utf-8"))


def on_one_line(text: str, limit: int | None = None) -> str:
    """Return what `plain` does, on one line: a newline out of a record must not begin a line of its own."""
    return plain(text, limit).replace("\n", "\\n").replace("\t", " ")


def plain(text: str, limit: int | None = None) -> str:
    """Return `text` with control, format and bidi characters shown as escapes, cut to `limit` characters.

    An escape sequence in a file's metadata must not move the cursor, colour the terminal or reorder a line.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode("ascii") if char not in "\n\t" and _is_hidden(char) else char
        for char in text
    )
