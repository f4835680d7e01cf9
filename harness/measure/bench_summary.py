"""What a bench measures and what it does not, in sentences, from the facts that a look at it gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.example import DTYPES
from harness.text import count

NEVER_RUNS = "a hook there, or an adapter in its place, never runs"
_SHOWN = 6
_VARIANTS = ("conv", "embedding", "experts")  # in which a LoRA is trained on a layer of the kind of this name


def summary(facts: Mapping[str, Any], idle: Mapping[str, str]) -> Iterator[str]:
    """Yield what a bench measures and what it does not, a sentence each; `idle` are targets not tried, with kinds."""
    layers, targets = facts["layers"], facts["targets"]
    rest = [name for name in layers if name not in set(targets)]
    yield f"{len(targets)} of {len(layers)} layers take a LoRA: {patterns(targets)}"
    for kind in dict.fromkeys(idle.values()):
        names = [name for name, own in idle.items() if own == kind]
        how = f": this loader does not declare the variant {kind}" if kind in _VARIANTS else ""
        yield f"not tried here: {patterns(names)}{how}"
    if rest:
        yield f"read, without a LoRA: {patterns(rest)}"
    for name, other in facts["shared"].items():
        yield f"{name} shares its weight with {other}: a merge into one changes both"
    for name, first in facts["twice"].items():
        yield f"{name} is {first} once more: what a loader does under that name is not measured"
    if never := [name for name in targets if name in set(facts["uncalled"])]:
        yield f"its forward does not call {patterns(never)}: {NEVER_RUNS}"
    for reason in dict.fromkeys(facts["unread"].values()):
        names = [name for name, why in facts["unread"].items() if why == reason]
        yield f"not measured: {patterns(names)}: {reason}"
    yield from _of_others(facts["others"], facts["owners"])
    if not facts["said"]["runs"]:
        yield "no forward is given: copies, casts and saved states are not tried, nor what a loader does in one"
    yield from _of_codes(layers, targets)
    if missing := [dtype for dtype in DTYPES if dtype not in facts["dtypes"]]:
        yield f"does not run in {', '.join(missing)}, which is not tried"


def _of_others(shapes: Mapping[str, list[int]], owners: Mapping[str, str]) -> Iterator[str]:
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    found = {kind: [n for n in matrices if owners[n] == kind] for kind in dict.fromkeys(owners[n] for n in matrices)}
    if matrices:
        said = ", ".join(f"{patterns(names)} ({kind})" for kind, names in found.items())
        yield f"not measured, only looked at for being changed: {said}"
    if stacks := [n for n in matrices if len(shapes[n]) == 3 and shapes[n][0] > 1 and "Conv" not in owners[n]]:
        yield f"where these are a matrix for each expert, experts=(…) measures them: {patterns(stacks)}"
    if vectors := len(shapes) - len(matrices):
        yield f"only looked at for being changed: {count(vectors, 'vector')} (norms, biases)"


def _of_codes(layers: Mapping[str, Any], targets: list[str]) -> Iterator[str]:
    if codes := sorted({layer["codes"] for layer in layers.values() if layer["codes"]}):
        yield f"quantised to {', '.join(codes)}: a merge is held against the right sum rounded to that"
        if plain := [name for name in targets if not layers[name]["codes"]]:
            yield f"not quantised: {patterns(plain)}"


def patterns(names: list[str]) -> str:
    """Return paths with `*` for numbers, each once; a number that they begin with stays, unless they are many."""
    kept, whole = ([*dict.fromkeys(_starred(name, first) for name in names)] for first in (1, 0))
    found = kept if len(kept) <= _SHOWN else whole
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _starred(path: str, kept: int) -> str:
    words = path.split(".")
    return ".".join([*words[:kept], *("*" if word.isdigit() else word for word in words[kept:])])
