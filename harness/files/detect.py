"""Which format a file has, decided from all of its keys and never from the first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

from harness.errors import LoraFileError, NoLoraError
from harness.files.config import PAIRED
from harness.files.format import Format, Place, Source
from harness.files.formats import FORMATS
from harness.files.keys import FULL_PARTS, METHOD_WORD, NOT_LORA, WEIGHT_ROLES, cut
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
    if source.method not in PAIRED:
        return FORMATS["peft"]  # whose other methods have no halves
    taken = _taken(source)
    if not taken:
        raise NoLoraError(source.file.path, _unknown(source))
    if len(taken) > 1 and not _are_components(taken):
        raise LoraFileError(source.file.path, _mixed(source, taken))
    return FORMATS[next(iter(taken))]


def _are_components(taken: Mapping[str, Taken]) -> bool:
    """Tell whether one dialect explains two formats: behind prefixes the denoiser, in bare names other parts beside."""
    first, *others = taken
    if first not in ("comfyui", "diffusers") or others != ["diffsynth"]:
        return False
    row = FORMATS[first]
    located = filter(None, (row.locate(stem, "", False) for stem in taken[first]))
    inside = {name.partition(".")[0] for _, name in located}
    return inside.isdisjoint(stem.partition(".")[0] for stem in taken["diffsynth"])


def sort_keys(source: Source, row: Format) -> Sorted:
    """Assign every key of `source` to a module and a role under the format `row`; it has no place for the others."""
    found = _sort_stems(source, row) or _sort_singly(source, row)
    if row.name in ("comfyui", "diffusers"):
        _add_components(source, row, found)
    return found


def _add_components(source: Source, row: Format, found: Sorted) -> None:
    """Take pairs in bare names as modules of a component of its own, called by the first word of the name."""
    tails = FORMATS["diffsynth"].tails
    taken = {key for roles in found.modules.values() for key in roles.values()}
    if len(taken) == sum(map(len, source.stems.values())):
        return
    for stem, parts in source.stems.items():
        component, dot, name = stem.partition(".")
        roles = {tails.get(tail, ""): key for tail, key in parts}
        if dot and {"A", "B"} <= roles.keys() and "" not in roles and taken.isdisjoint(roles.values()):
            found.modules.setdefault((component, name), roles)


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
        parts = cut(source.plain(key))
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
        stem, tail = cut(source.plain(key)) or ("", "")
        for name in (name for name, stems in taken.items() if tail in stems.get(stem, ())):
            votes.setdefault(name, key)
    found = " and ".join(f"{name} ({printable(key, 80)})" for name, key in votes.items())
    return f"mixes the key formats {found}: a loader of one of them leaves the other part out, so it is not judged"


def _unknown(source: Source) -> str:
    keys = source.file.keys
    if not keys:
        return "holds no tensors"
    known = [kind for key in keys if (parts := cut(key)) and (kind := NOT_LORA.get(parts[1]))]
    looked = ", ".join(f"{row.example.split()[0]} ({row.name})" for row in FORMATS.values())
    seen = f"{count(len(keys), 'key')} such as {printable(keys[0], 80)}" + (f" ({known[0]})" if known else "")
    looks = f"it looks like {kind}, and " if (kind := _kind(source)) else ""
    return f"{looks}no LoRA format fits its {seen}; looked for {looked}"


_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param.*", "*"})
_WEIGHT = re.compile(r".+\.(weight|bias|weight_scale|scale_weight|qweight|gamma|beta|running_mean)$|.+_embed\w*$")
_HALF = re.compile(r"(^|[._])(lora|lokr|hada|oft|glora)[._]", re.IGNORECASE)
_MOST_EMBEDDINGS = 16
_ENOUGH = 200  # characters of a key


def _kind(source: Source) -> str:
    """Say what a file without a LoRA looks like, empty when nobody knows."""
    tensors = source.file.tensors
    vectors = all(1 <= len(info.shape) <= 2 for info in tensors.values())
    if any(key.startswith(("ip_adapter.", "image_proj.")) for key in tensors):
        return "an IP-Adapter"
    if any(key.startswith("lllite_") for key in tensors):
        return "a ControlNet-LLLite, which is no LoRA"
    methods = [hit[1] for key in tensors for word in key.split(".") if (hit := METHOD_WORD.match(word))]
    if len(set(methods)) == 1 and len(methods) >= len(tensors) and not {*methods} & {"lora", "hada", "lokr"}:
        return f"an adapter of PEFT's method {methods[0]} without its adapter_config.json"
    if "prompt_embeddings" in tensors:
        return "the trained prompt of a PEFT adapter (prompt tuning) without its adapter_config.json"
    few = len(tensors) <= _MOST_EMBEDDINGS and not any("." in key for key in tensors)
    if vectors and (few or _EMBEDDINGS & tensors.keys()):
        return "a textual-inversion embedding"
    weights = sum(bool(_WEIGHT.match(key[-_ENOUGH:])) for key in tensors)
    if 2 * weights > len(tensors) and not any(map(_HALF.search, tensors)):
        return f"a full checkpoint or a part of one ({count(weights, 'weight')})"
    return ""
