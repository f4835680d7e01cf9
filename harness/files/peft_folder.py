"""All that PEFT saves beside low-rank pairs: whole modules, biases, token rows, parameters of experts, other methods.

What PEFT does not know by a name of its own it copies over the parameter of that name, so such a key replaces a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.files.adapter import LoraModule, Problem
from harness.files.config import PAIRED
from harness.files.detect import Sorted
from harness.files.format import Format, Place, Source
from harness.files.keys import OTHER_METHODS, TWICE
from harness.text import printable

_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_COPY = re.compile(r"(.+?)\.(?:base_layer|original_module)(?:\..*)?\.(weight|bias)")
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.\w+)?")
_LONGEST = 2_000  # characters of a name; a hostile one may make the patterns slow
_NESTED = ".base_layer"
_FIRST = re.compile(r"gate|up|w1|w3|w13|fc1|wi|c_fc")  # declared before its partner in every model that is known
_LAST = re.compile(r"down|w2|fc2|wo|c_proj")
_OWN = re.compile(r"(?:^|\.)lora_\w+(?:\.|$)")


def add_peft_parts(source: Source, row: Format, found: Sorted, problems: list[Problem]) -> frozenset[Place]:
    """Give the keys that no pair took to modules of `found`, and experts the names of their parameters.

    Returns the places of stacked experts, whose rank is that of the configuration.
    """
    config = source.config or {}
    prefixed = any(key.startswith(row.starts) for key in source.file.keys)
    taken = {key for roles in found.modules.values() for key in roles.values()}
    pairs = frozenset(name for (_, name), roles in found.modules.items() if {"A", "B"} <= roles.keys())
    for key in source.file.keys:
        path = _path(source.plain(key), row, source.config is not None and not prefixed)
        if 0 < len(path) <= _LONGEST and key not in taken and (part := _part(path, config, source.method)):
            if part[1] == "set_weight" and part[0].rpartition(".")[0] in pairs:  # a layer has no layer inside
                what = "a part of an adapted layer that is not known: B @ A is not its whole update"
                problems.append(Problem("LH708", printable(key), what, fatal=True))
                continue
            roles = found.modules.setdefault(("", part[0]), {})
            again = part[1] in roles and part[1] in TWICE  # PEFT saves the biases of saved modules twice
            roles.setdefault(TWICE[part[1]] if again else part[1], key)
    return frozenset(_name_experts(found, config, problems))


def _path(key: str, row: Format, bare: bool) -> str:
    """Return a key without PEFT's prefix; empty where it should have one and has not."""
    start = next((start for start in (*row.starts, "base_model.") if key.startswith(start)), None)
    return key[len(start) :] if start else key if bare or key.startswith("prompt_") else ""


def _part(path: str, config: Mapping[str, Any], kind: str) -> tuple[str, str] | None:
    """Return (module, role) of one key that is no half of a pair."""
    if tokens := _TOKENS.fullmatch(path):
        return tokens[1], "token_rows"
    if method := _of_method(path, kind):
        return method
    if _OWN.search(path):
        return None
    if copy := _COPY.fullmatch(path):
        return copy[1], _copied(copy[2], {} if "original_module" in path else config)
    if whole := _WHOLE.fullmatch(path):
        return whole[1], f"set_{whole[2]}"
    plain = _SAVED.sub("", path)
    saved = plain != path or any(f".{name}." in f".{plain}" for name in _strings(config.get("modules_to_save")))
    return (plain, "set_weight") if saved else None


def _strings(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _copied(what: str, config: Mapping[str, Any]) -> str:
    if what == "weight":
        return "base_copy"
    return "set_bias" if config.get("bias", "none") not in (None, "none") else "base_copy_bias"


def _of_method(path: str, kind: str) -> tuple[str, str] | None:
    """Return (module, what stands behind it) of a parameter that only another method has, such as `ia3_l`."""
    start = OTHER_METHODS.get(kind, f"{kind}_")
    parts = path.split(".")
    at = next((at for at, part in enumerate(parts) if part.startswith(start)), None)
    if at is None or kind in PAIRED:
        return None
    return ".".join(parts[:at]), ".".join(parts[at:]).removesuffix(".default")


def _name_experts(found: Sorted, config: Mapping[str, Any], problems: list[Problem]) -> Iterator[Place]:
    """Rename what adapts a parameter: PEFT wraps the module once for each, the one that is declared first innermost."""
    targets, plain = _strings(config.get("target_parameters")), _strings(config.get("target_modules"))
    layers: dict[Place, list[Place]] = {}
    for component, name in found.modules:
        owner = re.sub(rf"(?:{re.escape(_NESTED)})+$", "", name)
        if {"A", "B"} & found.modules[component, name].keys() and _parameters(owner, targets, plain):
            layers.setdefault((component, owner), []).append((component, name))
    for (component, owner), places in layers.items():
        inner_first = sorted(places, key=lambda place: -len(place[1]))
        for place, parameter in zip(inner_first, _parameters(owner, targets, plain), strict=False):
            name = owner if parameter == "weight" else f"{owner}.{parameter}"
            found.modules[component, name] = _moved(found, place)
            yield component, name
        for _, name in inner_first[len(_parameters(owner, targets, plain)) :]:
            what = f"no target_parameters entry is left for it, {len(places)} wrappers adapt this module"
            problems.append(Problem("LH708", printable(name), what))


def _moved(found: Sorted, place: Place) -> dict[str, str]:
    """Take the halves of one wrapper away from its place."""
    roles = found.modules[place]
    halves: dict[str, str] = {role: roles.pop(role) for role in ("A", "B") if role in roles}
    if not roles:
        del found.modules[place]
    return halves


def _parameters(owner: str, targets: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Return the parameters of one module that are targeted, in the order in which models declare them.

    A target without its module is that of any module but those that are targeted themselves, `plain`.
    """
    named = dict.fromkeys(target.rpartition(".")[::2] for target in targets)
    fits = [last for parent, last in named if parent and f".{owner}".endswith(f".{parent}")]
    if not fits and not any(f".{owner}".endswith(f".{name}") for name in plain):
        fits = [last for parent, last in named if not parent]
    return sorted(dict.fromkeys(fits), key=lambda last: bool(_LAST.search(last)) - bool(_FIRST.search(last)))


def wrapped(parameters: Iterable[str]) -> dict[str, str]:
    """Return under which names PEFT keeps what adapts parameters, in the order in which their model declares them."""
    owners: dict[str, list[str]] = {}
    for path in parameters:
        owners.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: owner + _NESTED * (len(paths) - 1 - depth)
        for owner, paths in owners.items()
        for depth, path in enumerate(paths)
    }


def experts(module: LoraModule, rank: int) -> LoraModule | None:
    """Return a module of stacked experts with `rank` each; None when its halves do not divide so."""
    if rank < 1 or module.rank % rank:
        return None
    return module.changed(rank=rank, experts=module.rank // rank, variant="experts", kernel=())
