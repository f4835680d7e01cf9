"""The tensors of a checkpoint that each module of a LoRA changes: a weight, a bias, or one that is not read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.match import layers_by_spelling
from harness.doctor.verify.dora import DoraLayer
from harness.doctor.verify.layer import MergedLayer
from harness.doctor.verify.products import Product, loha_product, lokr_product, pair_product, whole_product
from harness.files import FORMATS, LoraAdapter, LoraModule, TensorInfo
from harness.files.keys import NOT_LORA, OTHER_NAMES, cut
from harness.text import printable

_WEIGHT, _BIAS = ".weight", ".bias"
_PRODUCTS: Mapping[str, Callable[[LoraAdapter, str], Product]] = {
    "A": pair_product, "hada_w1_a": loha_product,
    "lokr_w1": lokr_product, "lokr_w1_a": lokr_product,
}  # fmt: skip
_WHOLE = {"diff": _WEIGHT, "w_norm": _WEIGHT, "diff_b": _BIAS, "b_norm": _BIAS}
_NOT_READ = {
    "set_weight": "a replaced weight", "reshape_weight": "a reshaped weight",
    "query_norm": "a replaced norm scale", "key_norm": "a replaced norm scale",
}  # fmt: skip

_OTHERS = {**NOT_LORA, "alpha": "an alpha that no module uses"}


@dataclass(frozen=True)
class Change:
    """One tensor that a module changes: `product` returns what one unit of scale adds to it.

    `name` is the module's, with the tensor behind it where that is a bias. `scaled` says that alpha / rank is in its
    scale; whole differences have the strength alone. `unread` says why it is not read.
    """

    name: str
    module: str
    tensor: str | None
    product: Callable[[], Product] | None = None
    scaled: bool = True
    unread: str | None = None


def changes(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    """Yield what module `name` changes, whose layer's weight is `tensor` (None: there is no such layer)."""
    keys = adapter.modules[name].keys
    found = [*_low_rank(adapter, name, tensor), *_wholes(adapter, name, tensor), *_unread(adapter, name, tensor)]
    weights = [change for change in found if change.product and change.tensor == tensor]
    if len(weights) > 1 and tensor is not None:
        why = "a low-rank update and a whole difference of one weight are not told apart"
        found = [change for change in found if change not in weights] + [Change(name, name, tensor, unread=why)]
    what = OTHER_NAMES.get(adapter.modules[name].variant) or f"parts {', '.join(sorted(keys))}"
    yield from found or [Change(name, name, tensor, unread=f"{what} is not read")]


def _low_rank(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    module = adapter.modules[name]
    if module.variant == "experts":
        yield Change(name, name, tensor, unread="experts stacked in one tensor are not read")
        return
    role = next((role for role in _PRODUCTS if role in module.keys), None)
    if role:
        yield Change(name, name, tensor, lambda: _PRODUCTS[role](adapter, name))
    if "bias" in module.keys:
        yield Change(f"{name} (bias)", name, _bias(tensor), lambda: whole_product(adapter, name, "bias"))


def _wholes(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    for role, end in _WHOLE.items():
        if role in adapter.modules[name].keys:
            place, shown = (tensor, name) if end == _WEIGHT else (_bias(tensor), f"{name} (bias)")
            yield Change(shown, name, place, lambda role=role: whole_product(adapter, name, role), scaled=False)  # type: ignore[misc]


def _unread(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    for role, what in _NOT_READ.items():
        if role in adapter.modules[name].keys:
            yield Change(name, name, tensor, unread=f"{what} is no update with a scale")
            return


def _bias(tensor: str | None) -> str | None:
    return None if tensor is None else tensor.removesuffix(_WEIGHT) + _BIAS


def unused_keys(adapter: LoraAdapter, base: Checkpoint) -> Iterator[Change]:
    """Yield the keys that belong to no module, one per layer: they are listed as not read, never passed over."""
    taken = {key for module in adapter.modules.values() for key in module.keys.values()}
    by_spelling = layers_by_spelling(base.layers, flattened=adapter.flattened)
    layers = {name.replace(".", "_") if adapter.flattened else name: layer for name, layer in by_spelling.items()}
    seen: dict[str, Change] = {}
    for key in adapter.unused_keys:
        if key not in taken:
            stem, tail = cut(key) or (key, "")
            what = _OTHERS.get(tail, "a key that is not understood")
            tensor = base.layers.get(layers.get(_without_prefix(stem, adapter.format), ""))
            seen.setdefault(stem, Change(stem, stem, tensor, unread=f"{printable(key, 80)} is {what}"))
    yield from seen.values()


def _without_prefix(stem: str, format: str) -> str:
    starts = sorted(FORMATS[format].prefixes, key=len, reverse=True)
    return next((stem[len(start) :] for start in starts if start and stem.startswith(start)), stem)


def merged_layer(adapter: LoraAdapter, change: Change, base: Checkpoint, merged: Checkpoint) -> MergedLayer | None:
    """Return the layer of a change that has a product and a tensor, or None when their shapes do not fit."""
    assert change.product is not None
    assert change.tensor is not None
    module = adapter.modules[change.module]
    product = _fitted(adapter, module, change.product(), base.info(change.tensor))
    if product is None:
        return None
    first = next(role for role in ("B", *module.keys) if role in module.keys and role != "alpha")
    dtype = str(adapter.part(change.module, first).dtype).removeprefix("torch.")
    parts = (change.tensor, base, merged, product, dtype)
    if not change.scaled or change.name != change.module or "magnitude" not in module.keys:
        return MergedLayer(*parts)
    magnitude = adapter.part(change.module, "magnitude")
    axis = _axis(tuple(magnitude.shape), product.shape, adapter.format)
    return None if axis is None else DoraLayer(*parts, magnitude, axis)


def _fitted(adapter: LoraAdapter, module: LoraModule, product: Product, info: TensorInfo) -> Product | None:
    """Return the product as the weight lies (Conv1D and embeddings are turned), None when it fits in no direction."""
    rows = info.shape[0] if info.shape else 1
    if adapter.format == "xlabs":  # it adapts the first rows of FLUX's `linear1`, q, k and v
        product = product.padded(rows)
    shape = rows, info.elements // max(rows, 1)
    turned = bool(adapter.config.get("fan_in_fan_out")) or module.variant == "embedding"
    if product.shape[::-1] == shape and (turned or product.shape != shape):
        return product.turned()
    return product if product.shape == shape else None


def _axis(magnitude: tuple[int, ...], shape: tuple[int, int], format: str) -> int | None:
    """Return the axis that a magnitude runs along: 0 the rows, 1 the columns; None when it fits neither.

    kohya's `dora_scale` says it by its shape, [out, 1] or [1, in]; PEFT's runs along the outputs.
    """
    count = math.prod(magnitude)
    fits = count == shape[0], count == shape[1]
    if all(fits):
        return int(format != "peft" and len(magnitude) > 1 and magnitude[0] == 1)
    return fits.index(True) if any(fits) else None
