"""What transformers calls the layers of a checkpoint in memory, where adapters are trained: its own conversions say."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_SIZES = re.compile(r"layer|depth|block|expert|stage")
_REACHES_OUT = re.compile(r"backbone|timm")
_MOST = 64  # of such a number, where the checkpoint has fewer layers
_WEIGHT = ".weight"


def in_file(config: Mapping[str, Any], layers: int) -> dict[str, str]:
    """Return {layer in memory: layer in the file} where transformers renames it; empty where that cannot be told.

    The model of `config` is built without weights, and not at all where it would be far deeper than the `layers` that
    its checkpoint has, or where it might load another one.
    """
    said = config.get("architectures")
    named = said[0] if isinstance(said, list) and said and isinstance(said[0], str) else ""
    if not named or any(map(_REACHES_OUT.search, _keys(config))) or _deepest(config) > max(layers, _MOST):
        return {}
    try:
        with _without_hub():
            return _renamed(named, json.dumps(config, sort_keys=True))
    except Exception:  # transformers is not here, or does not take this configuration: in many ways
        return {}


@contextmanager
def _without_hub() -> Iterator[None]:
    """Keep the block from a hub, and leave who called us as he was: its client asks its constant each time."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@lru_cache(8)
def _renamed(named: str, said: str) -> dict[str, str]:
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, named)
    if not issubclass(kind, transformers.PreTrainedModel):
        return {}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = kind(transformers.AutoConfig.for_model(**json.loads(said)))
    memory = model.state_dict()
    inside = {id(tensor): name for name, tensor in memory.items()}
    filed = revert_weight_conversion(model, dict(memory))
    pairs = ((inside.get(id(tensor), name), name) for name, tensor in filed.items())
    weights = ((old, new) for old, new in pairs if old != new and old.endswith(_WEIGHT) and new.endswith(_WEIGHT))
    return {old.removesuffix(_WEIGHT): new.removesuffix(_WEIGHT) for old, new in weights}


def _keys(config: object) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield str(key)
            yield from _keys(value)


def _deepest(config: object) -> int:
    """Return the largest number of layers, blocks or experts that a configuration asks for."""
    if not isinstance(config, Mapping):
        return 0
    asked = [value for key, value in config.items() if _SIZES.search(str(key))]
    own = [each for value in asked for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
    return max([0, *own, *map(_deepest, config.values())])
