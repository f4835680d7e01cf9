"""The findings as data: which file meets which fault of which release, and what to do instead.

`findings.toml` has a row per page of `docs/findings/`; what a file must be for it is a predicate on its traits
(`Words`, see `doctor/traits.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cache
from pathlib import Path
from typing import Any

from harness.text import read_toml

TABLE = Path(__file__).with_name("findings.toml")
LINK = "docs/findings/{}.md"
Words = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Finding:
    """One fault of a released loader; the head of `findings.toml` says what the fields mean.

    A limit of a tool that was read in its code and not measured has no page.
    """

    effect: str
    says: str
    file: tuple[Mapping[str, tuple[str, ...]], ...] = field(default=(), hash=False)
    page: str = ""
    loader: str = ""
    package: str = ""
    measured: str = ""
    versions: str = ""
    tools: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    what: str = ""
    instead: str = ""
    known: str = "no"

    @property
    def link(self) -> str:
        """The page, from the root of the repository."""
        return LINK.format(self.page)

    def in_release(self, version: str | None) -> bool:
        """Tell whether it is known in this release (None: the one it was measured in)."""
        if version in (None, self.measured):
            return True
        return bool(self.versions) and is_within(version, self.versions)

    def hits(self, words: Words) -> bool:
        """Tell whether a file with these traits meets it."""
        return any(all(_fits(globs, words.get(_trait(name), ())) for name, globs in one.items()) for one in self.file)

    def can_hit(self, form: str) -> bool:
        """Tell whether a file of this format can meet it."""
        return any(_fits(one.get("format", ()), (form,)) for one in self.file)

    @property
    def blocks(self) -> bool:
        """Tell whether no naive strength may be prescribed for a file that it hits."""
        return self.effect not in ("rounds", "note", "call")


def _trait(name: str) -> str:
    """Return the trait of a key such as `layer.2`, which asks a second time for the same."""
    return name.partition(".")[0]


def _fits(globs: tuple[str, ...], values: Iterable[str]) -> bool:
    every = list(values)
    never, whole, some = _compiled(globs)
    if never and any(map(never, every)):
        return False
    if whole and not (every and all(map(whole, every))):
        return False
    return some is None or any(map(some, every))


Match = Callable[[str], object]


@cache
def _compiled(globs: tuple[str, ...]) -> tuple[Match | None, Match | None, Match | None]:
    """Return what fits none of the globs that must not, all of those that must, and one of the others."""
    never = [glob[1:] for glob in globs if glob.startswith("!")]
    whole = [glob[1:] for glob in globs if glob.startswith("=")]
    return _match(never), _match(whole), _match([glob for glob in globs if not glob.startswith(("!", "="))])


def _match(globs: list[str]) -> Match | None:
    return re.compile("|".join(map(translate, globs))).match if globs else None


def is_within(version: str | None, versions: str) -> bool:
    """Tell whether a version is in a range such as `>=2.0.5`; what is no version, or no range, is in none."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # a tenth of the time of `--help`
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version or "") in SpecifierSet(versions, prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return False


@cache
def findings() -> dict[str, Finding]:
    """Return every finding by its page, in the order of the index."""
    rows: Iterable[dict[str, Any]] = read_toml(TABLE)["finding"]
    return {row["page"]: finding_of(row) for row in rows}


@cache
def findings_for(form: str) -> tuple[Finding, ...]:
    """Return those findings that a file of this format can meet."""
    return tuple(finding for finding in findings().values() if finding.can_hit(form))


def finding_of(row: Mapping[str, Any]) -> Finding:
    """Return the finding that a row of a table describes."""
    lists = {name: tuple(row[name]) for name in ("tools", "codes") if name in row}
    given = row.get("file", [])
    every = [given] if isinstance(given, dict) else given
    file = tuple({trait: tuple(globs) for trait, globs in one.items()} for one in every)
    return Finding(**{**row, **lists, "file": file})


def met(words: Words, *, tool: str | None = None, version: str | None = None) -> list[Finding]:
    """Return the findings that a file with these traits meets, in any tool or in one of a version."""
    return [
        finding
        for finding in findings().values()
        if (tool is None or tool in finding.tools) and finding.in_release(version) and finding.hits(words)
    ]
