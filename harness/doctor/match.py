"""Which layer of a model each module of a LoRA adapts: the one matcher of `inspect`, `verify` and `repair`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from harness.files import LoraAdapter, match_modules

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.")
_LIKE_A_NAME = "transformer."  # flattened it would make `transformer_blocks_0` of a layer `blocks.0`


class Match(NamedTuple):
    """A layer by its name in the model, and that name as the LoRA spells it: with dots, behind the LoRA's prefix."""

    layer: str
    spelling: str


def match_layers(adapter: LoraAdapter, layers: Collection[str]) -> dict[str, Match]:
    """Return {module of the adapter: its layer}; `layers` are names in the model or checkpoint.

    Names are compared as they are, and with the prefix of a checkpoint (`model.diffusion_model.`, `model.`) left out or
    replaced on either side. A name that fits several layers and a layer that several modules claim are left out.
    """
    by_spelling = layers_by_spelling(layers, flattened=adapter.flattened)
    found = {module: Match(by_spelling[name], name) for module, name in match_modules(adapter, by_spelling)[0].items()}
    claims = Counter(match.layer for match in found.values())
    return {module: match for module, match in found.items() if claims[match.layer] == 1}


def layers_by_spelling(layers: Collection[str], *, flattened: bool) -> dict[str, str]:
    """Return {spelling: layer} for all spellings that mean one layer; a layer's own name always means that layer."""
    found: dict[str, str] = {}
    shared = set()
    for layer in layers:
        for spelling in _spellings(layer):
            if found.setdefault(spelling, layer) != layer:
                shared.add(spelling)
    odd = {name for name in found if flattened and name.startswith(_LIKE_A_NAME)}
    return {name: layer for name, layer in found.items() if name not in shared | odd} | {name: name for name in layers}


def _spellings(layer: str) -> Iterator[str]:
    bare = layer.removeprefix(next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), ""))
    yield bare
    yield from (prefix + bare for prefix in _PREFIXES)


def shared_prefix(names: Collection[str]) -> str:
    """Return the known prefix that most names share, empty when there is none."""
    best = max(_PREFIXES, key=lambda prefix: sum(name.startswith(prefix) for name in names))
    return best if 2 * sum(name.startswith(best) for name in names) > len(names) else ""
