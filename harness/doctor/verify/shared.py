"""What a layer of another method than low-rank pairs shares with others, as far as a file tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_DECIDES = "PEFT's own merge of the whole model would decide"
_PROJECTED = {"frod": "frod_V", "tinylora": "tinylora_P"}  # what is worked out of all layers where it is not saved


class CannotMergeError(Exception):
    """Why PEFT could not merge one layer by itself."""


def shared_keys(kind: str, config: Mapping[str, Any], module: str, keys: Sequence[str]) -> dict[str, str]:
    """Return the keys of the file that the layer `module` shares, with what PEFT calls them where it stands alone.

    Raises:
        CannotMergeError: nothing tells which of them are this layer's, or they are not saved.
    """
    if kind in _PROJECTED and not config.get("save_projection", True):
        raise CannotMergeError(f"{_PROJECTED[kind]} is not saved, which PEFT works out of all layers: {_DECIDES}")
    if kind == "frod":
        return _of_category(module, keys)
    if kind == "tinylora":
        return _only_vector(keys)
    return {key: key for key in keys}


def _of_category(module: str, keys: Sequence[str]) -> dict[str, str]:
    """Return what layers of this kind share in FRoD, which calls them so."""
    from peft.tuners.frod.model import _category_from_key

    own = {key: key for key in keys if key.rpartition(".")[2] == _category_from_key(module)}
    if len(own) < len({key.rpartition(".")[0] for key in keys}):
        raise CannotMergeError(f"the file lacks what layers such as this one share: {_DECIDES}")
    return own


def _only_vector(keys: Sequence[str]) -> dict[str, str]:
    """Return the vector of TinyLoRA that all layers share."""
    if len(keys) > 1:
        what = f"which of its {len(keys)} vectors a layer has hangs on the order of the model's layers"
        raise CannotMergeError(f"{what}, which no file says: {_DECIDES}")
    return dict.fromkeys(keys, "base_model.tinylora_v.0")


def ready(kind: str, layer: nn.Module) -> None:
    """Work out again what a layer made of its own weight and of what it shares, now that this is loaded."""
    if kind == "frod":
        made: Any = layer
        weight = made.get_base_layer().weight
        found = made._calculate_frod_u_and_lambda(made.frod_V["default"], weight.T if made.fan_in_fan_out else weight)
        made.frod_U["default"] = found[0].to(weight.dtype).cpu()
