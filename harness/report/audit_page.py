"""The page of an audit: what is wrong by code, finding, folder, base and trainer; rows drawn as one scrolls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.report.html import asset
from harness.report.library import Library, base_of, folder_of, gravity, most_of, trainer_of, worst_code
from harness.report.links import finding_link
from harness.report.lora_page import Shown, counted, generated
from harness.text import plain
from harness.verdict.codes import CODES
from harness.verdict.file_record import FileRecord

_MOST_STATIC = 60
_MOST_GROUPS = 10
_MOST_STRINGS = 60_000  # that are said once and then counted
_WHAT = 240
_MIB = 1 << 20


def audit_page(rows: Sequence[FileRecord]) -> Iterator[str]:
    """Yield the page of an audit as HTML text: what is wrong how often and where, and every file with its verdict.

    The rows stand at the end as JSON, each string once, and are drawn as they are needed; the worst of them are in
    the page as they are, for browsers without JavaScript.
    """
    library = Library(rows, most=_MOST_STATIC)
    yield from generated(
        "audit.html.j2",
        asset("lora.js") + asset("audit.js"),
        library=library,
        groups=_groups(library),
        files=[(row, Shown(row, "")) for row in library.worst],
        data=_Data(rows),
        codes=CODES,
        finding_link=finding_link,
    )


def _groups(library: Library) -> list[tuple[str, str, list[tuple[str, Any]], int]]:
    tables = (("folder", "Folder", library.folders), ("base", "Base model", library.bases),
              ("trainer", "Trained with", library.trainers))  # fmt: skip
    return [(key, title, most_of(table, _MOST_GROUPS), len(table)) for key, title, table in tables]


class _Data:
    """The rows as JSON for the page's script, one in memory at a time: a string is said once, then its number."""

    def __init__(self, rows: Sequence[FileRecord]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[str]:
        strings: dict[str, int] = {}

        def say(text: str | None) -> str | int:
            shown = plain(text or "")
            if shown in strings:
                return strings[shown]
            if len(strings) < _MOST_STRINGS:
                strings[shown] = len(strings)
            return shown

        for number, row in enumerate(self._rows):
            text = json.dumps(_row(row, say), separators=(",", ":"))
            yield ("," if number else "") + text.replace("<", "\\u003c")  # no tag ends the script it stands in


def _row(row: FileRecord, say: Callable[[str | None], str | int]) -> list[Any]:
    """Return what `audit.js` reads, in this order; strings are said in the order in which they stand."""
    look, word, reason = Shown(row, "").outlook
    told: list[Any] = [plain(row.path.rpartition("/")[2]), say(folder_of(row))]
    told += [say("|".join((str(gravity(row)), look, worst_code(row), word)))]
    told += [[[say(hazard.code), say(hazard.what[:_WHAT])] for hazard in row.hazards] or 0]
    told += [say(row.format), row.modules, say(counted(row.ranks)), say(counted(row.alphas)), say(_trained(row))]
    told += [say(base_of(row)), say(trainer_of(row)), round((row.size or 0) / _MIB, 1)]
    more = [f"same weights as {row.duplicate_of}"] if row.duplicate_of else []
    more += [reason] if row.advice else []
    told += [[say(page) for page in row.findings], [plain(text) for text in more]] if row.findings or more else []
    return told


def _trained(row: FileRecord) -> str:
    if not row.trained:
        return "–"
    low, high = row.trained
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
