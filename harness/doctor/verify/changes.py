"""The tensors of a checkpoint that each module of a LoRA changes: a weight, a bias, or one that is not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.products import Product, loha_product, lokr_product, pair_product, whole_product
from harness.files import FORMATS, LoraAdapter
from harness.files.keys import NOT_LORA, split
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
class Piece:
    """One tensor that a module changes: `product` returns what one unit of scale adds to it.

    `name` is the module's, with the tensor behind it where that is a bias. `scaled` says that alpha / rank is in its
    scale; whole differences have the strength alone. `skipped` says why it is not read.
    """

    name: str
    module: str
    tensor: str | None
    product: Callable[[], Product] | None = None
    scaled: bool = True
    skipped: str | None = None


def pieces(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Piece]:
    """Yield what module `name` changes, whose layer's weight is `tensor` (None: there is no such layer)."""
    keys = adapter.modules[name].keys
    found = [*_low_rank(adapter, name, tensor), *_wholes(adapter, name, tensor), *_unread(adapter, name, tensor)]
    weights = [piece for piece in found if piece.product and piece.tensor == tensor]
    if len(weights) > 1 and tensor is not None:
        why = "skipped: a low-rank update and a whole difference of one weight are not told apart"
        found = [piece for piece in found if piece not in weights] + [Piece(name, name, tensor, skipped=why)]
    yield from found or [Piece(name, name, tensor, skipped=f"skipped: parts {', '.join(sorted(keys))} are not read")]


def _low_rank(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Piece]:
    module = adapter.modules[name]
    if module.variant == "experts":
        yield Piece(name, name, tensor, skipped="skipped: experts stacked in one tensor are not read")
        return
    role = next((role for role in _PRODUCTS if role in module.keys), None)
    if role:
        yield Piece(name, name, tensor, lambda: _PRODUCTS[role](adapter, name))
    if "bias" in module.keys:
        yield Piece(f"{name} (bias)", name, _bias(tensor), lambda: whole_product(adapter, name, "bias"))


def _wholes(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Piece]:
    for role, end in _WHOLE.items():
        if role in adapter.modules[name].keys:
            place, shown = (tensor, name) if end == _WEIGHT else (_bias(tensor), f"{name} (bias)")
            yield Piece(shown, name, place, lambda role=role: whole_product(adapter, name, role), scaled=False)  # type: ignore[misc]


def _unread(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Piece]:
    for role, what in _NOT_READ.items():
        if role in adapter.modules[name].keys:
            yield Piece(name, name, tensor, skipped=f"skipped: {what} is no update with a scale")
            return


def _bias(tensor: str | None) -> str | None:
    return None if tensor is None else tensor.removesuffix(_WEIGHT) + _BIAS


def strangers(adapter: LoraAdapter, base: Checkpoint) -> Iterator[Piece]:
    """Yield the keys that belong to no module, a piece per layer: they are listed as not read, never passed over."""
    taken = {key for module in adapter.modules.values() for key in module.keys.values()}
    layers = {key.removesuffix(_WEIGHT): key for key in base.names if key.endswith(_WEIGHT)}
    layers |= {name.replace(".", "_"): tensor for name, tensor in layers.items()} if adapter.flattened else {}
    seen: dict[str, Piece] = {}
    for key in adapter.unused_keys:
        if key not in taken:
            cut = split(key)
            stem = cut.stem if cut else key
            what = _OTHERS.get(cut.tail if cut else "", "a key that is not understood")
            tensor = layers.get(_without_prefix(stem, adapter.format))
            seen.setdefault(stem, Piece(stem, stem, tensor, skipped=f"skipped: {printable(key, 80)} is {what}"))
    yield from seen.values()


def _without_prefix(stem: str, format: str) -> str:
    starts = sorted(FORMATS[format].prefixes, key=len, reverse=True)
    return next((stem[len(start) :] for start in starts if start and stem.startswith(start)), stem)
