"""How layers are spelt: with and without the prefixes of models and wrappers, flattened, and by their endings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from harness.files.architectures import Alias, aliases

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.")
_LIKE_A_NAME = "transformer."  # flattened it would make `transformer_blocks_0` of a layer `blocks.0`
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
_LEADING = (
    "base_model", "model", "diffusion_model", "transformer", "unet", "language_model", "text_model", "net", "dit",
    "pipe",
)  # fmt: skip
_FLAT_LEADING = re.compile(
    rf"(?:_orig_mod|module|{'|'.join(word for word in _LEADING if word != 'transformer')}|transformer(?!_blocks))_(?=.)"
)


def layer_of(tensor: str, dimensions: int) -> str | None:
    """Return the layer whose weight a tensor is; None when it is none.

    Parameters of three dimensions, which stack experts, have their own name, torch's attention has `in_proj`.
    """
    if tensor.endswith(".weight"):
        return tensor.removesuffix(".weight")
    if tensor.endswith(".in_proj_weight") and dimensions == 2:
        return tensor.removesuffix("_weight")
    return tensor if dimensions == 3 else None


def layers_by_spelling(layers: Iterable[str], *, flattened: bool) -> dict[str, str]:
    """Return {spelling: layer} for all spellings that mean one layer; a layer's own name always means that layer."""
    found: dict[str, str] = {}
    shared, own = set(), dict.fromkeys(layers)
    for layer in own:
        for spelling in _spellings(layer):
            if found.setdefault(spelling, layer) != layer:
                shared.add(spelling)
    odd = {name for name in found if flattened and name.startswith(_LIKE_A_NAME)}
    return {name: layer for name, layer in found.items() if name not in shared | odd} | {name: name for name in own}


def _spellings(layer: str) -> Iterator[str]:
    bare = layer.removeprefix(next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), ""))
    yield bare
    yield from (prefix + bare for prefix in _PREFIXES)


def shared_prefix(names: Collection[str]) -> str:
    """Return the known prefix that most names share, empty when there is none."""
    best = max(_PREFIXES, key=lambda prefix: sum(name.startswith(prefix) for name in names))
    return best if 2 * sum(name.startswith(best) for name in names) > len(names) else ""


def core(name: str) -> str:
    """Return a dotted name without wrappers and without the prefixes of larger models."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS] or [name]
    start = next((place for place, part in enumerate(parts) if part not in _LEADING), len(parts) - 1)
    return ".".join(parts[start:])


def flat_core(name: str) -> str:
    """Return a flattened name without wrappers and without the prefixes of larger models."""
    while found := _FLAT_LEADING.match(name):
        name = name[found.end() :]
    return name


class Scope:
    """The names under which the layers of one component can be found; `names` maps a name in the component to each."""

    def __init__(self, names: Mapping[str, str], flattened: bool) -> None:
        self.names, self.flattened = names, flattened
        self.exact: dict[str, set[str]] = defaultdict(set)
        self.dotted = layers_by_spelling(names, flattened=flattened)
        for spelling in self.dotted:
            self.exact[self.key(spelling)].add(spelling)
        self._cores: dict[str, list[str]] | None = None
        self._others: dict[str, list[tuple[Alias, str]]] = {}
        self._tails: dict[str, set[str]] = {}

    def key(self, name: str) -> str:
        """Return a name as the LoRA spells it."""
        return name.replace(".", "_") if self.flattened else name

    @property
    def cores(self) -> dict[str, list[str]]:
        """Names by their core."""
        if self._cores is None:
            self._cores = defaultdict(list)
            self._others = defaultdict(list)
            for own, layer in self.names.items():
                self._cores[self.key(core(own))].append(own)
                for alias in aliases(core(own)):
                    self._others[self.key(alias.name)].append((alias, layer))
            for name in [*self._cores, *self._others]:
                for tail in self.tails(name):
                    self._tails.setdefault(tail, set()).add(name)
        return self._cores

    def others(self, name: str) -> list[tuple[Alias, str]]:
        """Return the layers that an architecture calls `name`."""
        return self._others.get(name, []) if self.cores else []

    def tails(self, name: str) -> list[str]:
        """Return the endings of a name that still hold its first number and the word before it, the longest first."""
        mark = "_" if self.flattened else "."
        parts = name.split(mark)
        first = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        return [mark.join(parts[start:]) for start in range(1, first)]

    def ending(self, name: str) -> str | None:
        """Return the one name of a layer that `name` ends in, or that ends in `name`."""
        known = self.cores
        longer = self._tails.get(name, set())
        if not longer:
            return next((tail for tail in self.tails(name) if tail in known or tail in self._others), None)
        return next(iter(longer)) if len(longer) == 1 else None
