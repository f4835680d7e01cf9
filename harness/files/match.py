"""Which module of a model a name in a file means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from harness.files.adapter import LoraAdapter


def match_modules(
    adapter: LoraAdapter, model_names: Iterable[str], *, component: str | None = None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return {name in the file: name in the model} and the names in the file that fit no single module.

    Flattened names (kohya) are compared with the model's names flattened; a flattened name that several modules share,
    or that several modules of the file would claim, is left unmatched (see `flattened_collisions`). `component` limits
    the match to one part of the pipeline, such as `te1`.
    """
    wanted = {name: m.name for name, m in adapter.modules.items() if component in (None, m.component)}
    index = _index(model_names, adapter.flattened)
    found = {name: index[key][0] for name, key in wanted.items() if len(index.get(key, ())) == 1}
    claims = Counter(found.values())
    matched = {name: model_name for name, model_name in found.items() if claims[model_name] == 1}
    return matched, tuple(name for name in wanted if name not in matched)


def flattened_collisions(model_names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the flattened names that stand for more than one module of a model, with those modules."""
    return {key: names for key, names in _index(model_names, True).items() if len(names) > 1}


def _index(model_names: Iterable[str], flattened: bool) -> dict[str, tuple[str, ...]]:
    index: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(model_names):
        key = name.replace(".", "_") if flattened else name
        index[key] = (*index.get(key, ()), name)
    return index
