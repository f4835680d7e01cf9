"""Text from LoRA files and loaders is hostile until shown to be plain."""

from __future__ import annotations

import unicodedata

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
