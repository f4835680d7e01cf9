"""Releases that were measured, kept as they come: of a run that is killed nothing is measured twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from harness.checks.releases import Place, ReleaseLaw
from harness.law.released import NOT_JUDGED
from harness.outputs import LineWriter, damaged, read_lines, saying, tell, text_of
from harness.report.environment import installed_versions
from harness.text import count, parse_json

TABLES = "releases.json"
_MOST_BYTES = 64 << 20
_RELEASE = TypeAdapter(ReleaseLaw)
_NO_TABLE = (ValueError, TypeError, KeyError)
_Kept = tuple[str, dict[str, str], ReleaseLaw]


class KeptReleases:
    """The releases in OUT: those of its tables, and those that a run which was cut left in a file beside them.

    Raises:
        UserError: OUT cannot be read or written.
    """

    def __init__(self, out: Path, *, resume: bool) -> None:
        self._path, self._versions = out / f"{TABLES}.part.jsonl", installed_versions()
        with saying(out):
            left = list(self._left())
            self._known = [*_of_tables(out / TABLES), *left] if resume else []
            self._lines = LineWriter(self._path)
        if left and not resume:
            tell(f"{out} has {count(len(left), 'release')} of a run that was cut; --resume takes them over")

    def measured(self, loader: str, versions: Sequence[str], places: Sequence[Place]) -> dict[str, ReleaseLaw]:
        """Return, by version, the releases that were measured in these very places beside the same packages."""
        wanted = set(places)
        return {
            release.version: release
            for name, packages, release in self._known
            if name == loader and packages == self._versions and release.version in versions
            if _is_whole(release) and {(cell.format, cell.bench) for cell in release.cells} == wanted
        }

    def add(self, loader: str, release: ReleaseLaw) -> None:
        """Keep a release that was measured just now."""
        with saying(self._path):
            self._lines.write(json.dumps({"loader": loader, "versions": self._versions, "releases": [asdict(release)]}))

    def close(self, *, written: bool) -> None:
        """Let go of the file, and take it away when the tables are `written` or nothing is in it."""
        with saying(self._path):
            self._lines.close()
            if written or not self._path.stat().st_size:
                self._path.unlink()

    def _left(self) -> Iterator[_Kept]:
        if not self._path.exists():
            return
        broken = []
        for number, line in read_lines(self._path):
            try:
                yield from _of_table(parse_json(line, limit=_MOST_BYTES))
            except _NO_TABLE:
                broken.append(number)
        if broken:
            tell(damaged(self._path, broken, "these releases are measured again"))


def _is_whole(release: ReleaseLaw) -> bool:
    """Whether a release need not be measured again: it could be started, and nothing else ended what it did."""
    return not release.problem and not any(state in NOT_JUDGED for state in release.states.values())


def _of_tables(path: Path) -> Iterator[_Kept]:
    if not path.exists():
        return
    try:
        for table in parse_json(text_of(path).encode(), limit=_MOST_BYTES):
            yield from _of_table(table)
    except _NO_TABLE:
        tell(f"{path} holds no tables of releases; nothing of it is taken over")


def _of_table(table: dict[str, Any]) -> Iterator[_Kept]:
    for each in table["releases"]:
        yield table["loader"], table["versions"], release_from(each)


def release_from(data: Mapping[str, Any]) -> ReleaseLaw:
    """Return a release whose fields went through JSON.

    Raises:
        ValueError: they are not those of a release.
    """
    return _RELEASE.validate_python(data)
