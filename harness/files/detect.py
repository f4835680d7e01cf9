"""Which format a file has, decided from all of its keys and never from the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import LoraFileError
from harness.files.format import Format, Place, Source
from harness.files.formats import FORMATS
from harness.files.keys import FULL_PARTS, NOT_LORA, WEIGHT_ROLES
from harness.files.source import open_source
from harness.files.text import count, printable


@dataclass
class Sorted:
    """Every key of a file under one format: keys by module and role, and the keys that format does not know."""

    modules: dict[Place, dict[str, str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)


def detect_format(path: Path | str) -> str:
    """Return the name of the format of a LoRA file or folder.

    Raises:
        LoraFileError: no format fits, the keys mix formats, or the file cannot be read.
    """
    return detect(open_source(path)).name


def detect(source: Source) -> Format:
    """Return the format that explains every weight of `source`, the most specific first.

    Low-rank weights count in any place, whole tensors (`.diff`) only behind a prefix that belongs to LoRA files.

    Raises:
        LoraFileError: no format fits, or the keys mix formats.
    """
    votes: dict[str, str] = {}
    rows = [(row, row.bare_fits(source)) for row in FORMATS.values() if row.fits(source)]
    by_tail: dict[str, list[tuple[Format, bool]]] = {}
    for key, cut in source.splits:
        if cut:
            able = by_tail.get(cut.tail)
            if able is None:
                able = by_tail[cut.tail] = list(_able(cut.tail, rows))
            for row, bare in able:
                if source.place(row, cut, bare):
                    votes.setdefault(row.name, key)
                    break
    if len(votes) == 1:
        return FORMATS[next(iter(votes))]
    raise LoraFileError(source.file.path, _mixed(votes) if votes else _unknown(source))


def sort_keys(source: Source, row: Format) -> Sorted:
    """Assign every key of `source` to a module and a role under the format `row`."""
    result = Sorted()
    bare = row.bare_fits(source)
    for key, cut in source.splits:
        place = source.place(row, cut, bare) if cut and cut.tail in row.tails else None
        if cut is None or place is None:
            result.unused.append(key)
            continue
        role, roles = row.tails[cut.tail], result.modules.setdefault(place, {})
        if role in roles:
            result.doubled.append(key)
        else:
            roles[role] = key
    return result


def _able(tail: str, rows: Iterable[tuple[Format, bool]]) -> Iterator[tuple[Format, bool]]:
    """Yield the formats for which a key with this tail speaks, and whether it does so without a prefix."""
    for row, bare in rows:
        role = row.tails.get(tail)
        if role in WEIGHT_ROLES or role in FULL_PARTS:
            yield row, bare and role in WEIGHT_ROLES


def _mixed(votes: Mapping[str, str]) -> str:
    found = " and ".join(f"{name} ({printable(key, 80)})" for name, key in votes.items())
    return f"mixes the key formats {found}: no loader reads both, so part of it would be ignored"


def _unknown(source: Source) -> str:
    keys = source.file.keys
    if not keys:
        return "holds no tensors"
    known = [kind for _, cut in source.splits if cut and (kind := NOT_LORA.get(cut.tail))]
    looked = ", ".join(f"{row.example.split()[0]} ({row.name})" for row in FORMATS.values())
    seen = f"{count(len(keys), 'key')} such as {printable(keys[0], 80)}" + (f" ({known[0]})" if known else "")
    return f"no LoRA format fits its {seen}; looked for {looked}"
