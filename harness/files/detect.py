"""Which format a file has, decided from all of its keys and never from the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

from harness.errors import LoraFileError
from harness.files.config import PAIRED, method_of
from harness.files.format import Format, Place, Source
from harness.files.formats import FORMATS
from harness.files.keys import FULL_PARTS, NOT_LORA, WEIGHT_ROLES, cut
from harness.text import count, printable

_SPEAKING = WEIGHT_ROLES | frozenset(FULL_PARTS)
_SPEAKING_TAILS = frozenset(t for row in FORMATS.values() for t, role in row.tails.items() if role in _SPEAKING)
Tails = tuple[str, ...]
Taken = dict[str, Tails]  # what stands before the tails of keys -> those tails


@dataclass
class Sorted:
    """The keys of a file under one format: by module and role, and those whose role was taken already."""

    modules: dict[Place, dict[str, str]] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)


def detect(source: Source) -> Format:
    """Return the format that explains every weight of `source`, the most specific first.

    Low-rank weights count in any place, whole tensors (`.diff`) only behind a prefix that belongs to LoRA files.

    Raises:
        LoraFileError: no format fits, or the keys mix formats.
    """
    if method_of(source.config or {}) not in PAIRED:
        return FORMATS["peft"]  # whose other methods have no halves
    taken = _taken(source)
    if len(taken) == 1:
        return FORMATS[next(iter(taken))]
    raise LoraFileError(source.file.path, _mixed(source, taken) if taken else _unknown(source))


def sort_keys(source: Source, row: Format) -> Sorted:
    """Assign every key of `source` to a module and a role under the format `row`; it has no place for the others."""
    return _sort_stems(source, row) or _sort_singly(source, row)


def _sort_stems(source: Source, row: Format) -> Sorted | None:
    """Sort all keys of a module at once; None when two could claim the same place, or a tail decides the place."""
    if row.naming:
        return None
    bare, tails = row.bare_fits(source), row.tails
    modules: dict[Place, dict[str, str]] = {}
    for stem, parts in source.stems.items():
        if place := row.locate(stem, "", bare):
            roles = {tails.get(tail, ""): key for tail, key in parts}
            if place in modules or "" in roles or len(roles) < len(parts):
                return None
            modules[place] = roles
    return Sorted(modules)


def _sort_singly(source: Source, row: Format) -> Sorted:
    result = Sorted()
    bare = row.bare_fits(source)
    for key in source.file.keys:
        parts = cut(key)
        place = row.locate(parts[0], parts[1], bare) if parts and parts[1] in row.tails else None
        if parts and place:
            role, roles = row.tails[parts[1]], result.modules.setdefault(place, {})
            if role in roles:
                result.doubled.append(key)
            else:
                roles[role] = key
    return result


def _taken(source: Source) -> dict[str, Taken]:
    """Return what speaks for each format; a key speaks for the first format that has a place for it."""
    waiting: dict[Tails, list[str]] = {}
    for stem, parts in source.stems.items():
        waiting.setdefault(tuple([tail for tail, _ in parts]), []).append(stem)
    found: dict[str, Taken] = {}
    for row in FORMATS.values():
        if any(map(_SPEAKING_TAILS.intersection, waiting)) and (row.trait is None or row.trait(source)):
            taken: Taken = {}
            waiting = _left_over(row, row.bare_fits(source), waiting, taken)
            found |= {row.name: taken} if taken else {}
    return found


def _left_over(row: Format, bare: bool, waiting: dict[Tails, list[str]], taken: Taken) -> dict[Tails, list[str]]:
    """Move the keys that speak for the format `row` from `waiting` to `taken`; return the others."""
    left: dict[Tails, list[str]] = {}
    for tails, stems in waiting.items():
        for gone, some in _by_answer(row, _questions(row, bare, tails), stems).items():
            taken |= dict.fromkeys(some, gone) if gone else {}
            left.setdefault(tuple([tail for tail in tails if tail not in gone]), []).extend(some)
    return left


def _by_answer(row: Format, questions: list[tuple[Tails, str, bool]], stems: list[str]) -> dict[Tails, list[str]]:
    """Return the stems by those of their tails that the format `row` takes."""
    alone = any(flag for _, _, flag in questions)
    if not questions or not (alone or any(stem.startswith(row.starts) for stem in stems)):
        return {(): stems}
    found: dict[Tails, list[str]] = {}
    for stem in stems:
        places = [some for some, asked, flag in questions if row.locate(stem, asked, flag)]
        found.setdefault(places[0] if len(places) == 1 else tuple(chain(*places)), []).append(stem)
    return found


def _questions(row: Format, bare: bool, tails: Tails) -> list[tuple[Tails, str, bool]]:
    """Return tails of `tails` that may speak for `row`, with what to ask it of all of them: `locate(…, asked, alone)`.

    Whole tensors do not speak alone, that is without a prefix.
    """
    alone: dict[bool, Tails] = {}
    for tail in tails:
        if (role := row.tails.get(tail)) in _SPEAKING:
            flag = bare and role in WEIGHT_ROLES
            alone[flag] = (*alone.get(flag, ()), tail)
    if row.naming:
        return [((tail,), tail, flag) for flag, some in alone.items() for tail in some]
    return [(some, "", flag) for flag, some in alone.items()]


def _mixed(source: Source, taken: Mapping[str, Taken]) -> str:
    votes: dict[str, str] = {}
    for key in source.file.keys:
        stem, tail = cut(key) or ("", "")
        for name in (name for name, stems in taken.items() if tail in stems.get(stem, ())):
            votes.setdefault(name, key)
    found = " and ".join(f"{name} ({printable(key, 80)})" for name, key in votes.items())
    return f"mixes the key formats {found}: no loader reads both, so part of it would be ignored"


def _unknown(source: Source) -> str:
    keys = source.file.keys
    if not keys:
        return "holds no tensors"
    known = [kind for key in keys if (parts := cut(key)) and (kind := NOT_LORA.get(parts[1]))]
    looked = ", ".join(f"{row.example.split()[0]} ({row.name})" for row in FORMATS.values())
    seen = f"{count(len(keys), 'key')} such as {printable(keys[0], 80)}" + (f" ({known[0]})" if known else "")
    return f"no LoRA format fits its {seen}; looked for {looked}"
