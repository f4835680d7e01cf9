"""The tensors of a checkpoint that each module of a LoRA changes, and what it makes of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.doctor.spelling import layers_by_spelling
from harness.doctor.verify.layer import DoraLayer, MergedLayer
from harness.doctor.verify.products import Experts, Hadamard, Kronecker, LowRank, Product, ScaledProduct, Whole
from harness.doctor.verify.weights import Weights
from harness.files import FORMATS, LoraAdapter, LoraModule, TensorInfo
from harness.files.architectures import Slot
from harness.files.config import changing_init
from harness.files.keys import NOT_LORA, OTHER_NAMES, TWICE, cut
from harness.text import printable


def pair_product(adapter: LoraAdapter, name: str) -> Product:
    """Return B @ A, or with a Tucker core the product of the core with both: rank columns on the left either way.

    Tucker: delta[o, i, k] = sum_pq B[o, p] mid[p, q, k] A[q, i].
    """
    a, b = (half.flatten(1) for half in adapter.tensors(name))
    if "mid" not in adapter.modules[name].keys:
        return LowRank(b, a)
    return LowRank(b, _cored(adapter.part(name, "mid"), a))


def experts_product(adapter: LoraAdapter, name: str) -> Product:
    """Return B @ A of every expert."""
    a, b = adapter.tensors(name)
    return Experts(b, a)


def loha_product(adapter: LoraAdapter, name: str) -> Product:
    """Return (w1_a w1_b) * (w2_a w2_b); with a Tucker core t: [r, r, *kernel], w_a is [r, out]."""
    halves = []
    for number in "12":
        a, b = (adapter.part(name, f"hada_w{number}_{side}") for side in "ab")
        core = f"hada_t{number}"
        tucker = core in adapter.modules[name].keys
        halves.append(LowRank(a.t(), _cored(adapter.part(name, core), b)) if tucker else LowRank(a, b))
    return Hadamard(halves[0], halves[1])


def lokr_product(adapter: LoraAdapter, name: str) -> Product:
    """Return w1 ⊗ w2, each full or low-rank; the kernel of a convolution lies in the columns of w2."""
    return Kronecker(_lokr_factor(adapter, name, "lokr_w1"), _lokr_factor(adapter, name, "lokr_w2"))


def _lokr_factor(adapter: LoraAdapter, name: str, role: str) -> Product:
    keys = adapter.modules[name].keys
    if role in keys:
        return Whole(adapter.part(name, role).flatten(1))
    a, b = adapter.part(name, f"{role}_a"), adapter.part(name, f"{role}_b")
    if role == "lokr_w2" and "lokr_t2" in keys:
        return LowRank(a.t(), _cored(adapter.part(name, "lokr_t2"), b))
    return LowRank(a, b.flatten(1))


def _cored(core: Tensor, right: Tensor) -> Tensor:
    """Return sum_q core[p, q, k] right[q, i]: [p, i * k]."""
    return torch.einsum("pq...,qi->pi...", core.float(), right.float()).flatten(1)


def whole_product(adapter: LoraAdapter, name: str, role: str) -> Product:
    """Return a tensor of the file as a matrix; a vector is one column."""
    tensor = adapter.part(name, role)
    return Whole(tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1))


_WEIGHT, _BIAS = ".weight", ".bias"
_PRODUCTS: Mapping[str, Callable[[LoraAdapter, str], Product]] = {
    "A": pair_product, "hada_w1_a": loha_product,
    "lokr_w1": lokr_product, "lokr_w1_a": lokr_product,
}  # fmt: skip
_WHOLE = {"diff": _WEIGHT, "w_norm": _WEIGHT, "diff_b": _BIAS, "b_norm": _BIAS}
_SAVED = {"set_weight": _WEIGHT, "set_bias": _BIAS, "token_rows": _WEIGHT}
_NOT_READ = {
    "reshape_weight": "a reshaped weight",
    "query_norm": "a replaced norm scale", "key_norm": "a replaced norm scale",
}  # fmt: skip
_OTHERS = {**NOT_LORA, "alpha": "an alpha that no module uses"}
_OUTPUT = ".base_layer.out_proj"
_ADDED_TWICE = (
    "PEFT adds the update of torch's attention output twice, in training and when it merges; others add it once"
)
_BASE_COPIES = frozenset({"copy"})
_IN_OUT = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})  # `is_transposed` in transformers 5.23.0
_STORED_TURNED = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})  # otherwise on disk than in memory


@dataclass(frozen=True)
class Change:
    """One tensor, or some rows of it, that a module changes.

    `product` returns what one unit of scale adds to it, `parts` the rows of it that go there (none: all); `saved` is
    the role of the tensor that replaces it; `method` says that PEFT's own merge must tell, `largest` the size of the
    largest layer of its kind. `stacks` says that it is of several experts, `turned` that B_e @ A_e of each is stored
    transposed, None where all are square and nothing tells. `name` is the module's, with the tensor behind it where
    that is a bias. `scaled` says that alpha / rank is in its scale; whole differences have the strength alone. `unread`
    says why it is not judged, `kind` of what kind that is; `residual` why the base had other weights in training, so
    that of its merge nothing can be told but that there was none.
    """

    name: str
    module: str
    tensor: str | None
    product: Callable[[], Product] | None = None
    scaled: bool = True
    unread: str | None = None
    saved: str | None = None
    method: bool = False
    largest: tuple[int, int] = (1, 1)
    parts: tuple[tuple[int, int], ...] = ()
    turned: bool | None = None
    stacks: bool = False
    kind: str = "unsupported"
    residual: str = ""


def changes(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    """Yield what module `name` changes, whose layer's weight is `tensor` (None: there is no such layer)."""
    module = adapter.modules[name]
    if module.variant in _BASE_COPIES or not module.name:
        return
    if _by_method(adapter, module):
        yield Change(name, name, tensor, method=True)
        return
    if adapter.format == "peft" and name.removesuffix(_OUTPUT) in adapter.modules.keys() - {name}:
        yield Change(name, name, tensor, unread=_ADDED_TWICE, kind="ambiguous")
        return
    found = [*_low_rank(adapter, name, tensor), *_wholes(adapter, name, tensor), *_unread(adapter, name, tensor)]
    what = OTHER_NAMES.get(module.variant) or f"parts {', '.join(sorted(module.keys))}"
    found = found or [Change(name, name, tensor, unread=f"{what} is not read")]
    init = changing_init(adapter.config) if adapter.format == "peft" and module.rank else None
    why = f"init_lora_weights is {printable(init, 40)}, which changes the base too" if init else ""
    yield from (replace(one, residual=why) for one in found) if why else found


def _by_method(adapter: LoraAdapter, module: LoraModule) -> bool:
    """Tell whether only PEFT's own merge says what a module does."""
    own = module.variant == adapter.kind and adapter.kind not in ("lora", "loha", "lokr")
    return adapter.format == "peft" and "peft_type" in adapter.config and own


def experts_turned(adapter: LoraAdapter, slots: Mapping[str, tuple[Slot, ...]], base: Weights) -> bool | None:
    """Tell whether a model stores B_e @ A_e transposed; None where all experts are square and nothing else tells."""
    modules = {name: module for name, module in adapter.modules.items() if module.variant == "experts"}
    stacked = False
    for name, some in slots.items():
        if name in modules:
            shape = base.info(base.layers[some[0].layer]).shape
            stacked |= len(shape) > 2
            side = shape[1] if len(shape) > 2 else (some[-1].part or (0, 0))[1] // modules[name].experts
            if modules[name].in_features != modules[name].out_features:
                return side == modules[name].in_features
    return _squares_turned(adapter, base.store.config.get("model_type") if stacked else "")


def _squares_turned(adapter: LoraAdapter, model: object) -> bool | None:
    """Tell it of square experts, by PEFT's rule: since 0.19 the model's class says how its parameters lie.

    `model` is the type of one whose file stacks its experts, empty for one by one, None when it is not known.
    """
    if adapter.format != "peft":
        return None if any(module.flipped for module in adapter.modules.values()) else False
    version = re.match(r"(\d+)\.(\d+)", str(adapter.config.get("peft_version", "")))
    if version is None or model is None or model in _STORED_TURNED:
        return None
    return (int(version[1]), int(version[2])) < (0, 19) or model in _IN_OUT


def slots_of(change: Change, slots: tuple[Slot, ...], stores: tuple[Weights, Weights]) -> Iterator[Change]:
    """Yield a change for every slot of its module: rows of the layer, and the part of the product that goes there.

    Experts that the model keeps one by one are one tensor, stacked.
    """
    tensors = [stores[0].layers[slot.layer] for slot in slots]
    if change.stacks and len(tensors) > 1 and all(name in store.names for name in tensors for store in stores):
        yield replace(change, tensor=[store.stack(change.module, tensors) for store in stores].pop())
        return
    by_layer: dict[str, list[Slot]] = {}
    for slot in slots:
        by_layer.setdefault(slot.layer, []).append(slot)
    for layer, some in by_layer.items():
        tensor = stores[0].layers[layer]
        is_bias = change.tensor is not None and change.tensor.endswith(_BIAS) and tensor.endswith(_WEIGHT)
        shown = change.name if len(by_layer) == 1 else f"{change.name} ({'.'.join(layer.split('.')[-2:])})"
        place = _bias(tensor) if is_bias else tensor
        rows = [slot.rows for slot in some if slot.rows]
        if rows and place and all(place in store.names for store in stores):
            if len(stores[0].info(place).shape) > 2:
                place = [store.folded(place) for store in stores].pop()
            if max(stop for _, stop in rows) > min(store.info(place).shape[0] for store in stores):
                yield replace(change, name=shown, unread=f"{layer} has fewer rows than this changes", kind="misfit")
                continue
            place = [store.slice(place, rows) for store in stores].pop()
        yield replace(change, name=shown, tensor=place, parts=tuple(slot.part for slot in some if slot.part))


def _low_rank(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    module = adapter.modules[name]
    role = next((role for role in _PRODUCTS if role in module.keys), None)
    if role:
        make = experts_product if module.variant == "experts" else _PRODUCTS[role]
        yield Change(name, name, tensor, lambda: make(adapter, name), stacks=module.variant == "experts")
    if "bias" in module.keys:
        yield Change(f"{name} (bias)", name, _bias(tensor), lambda: whole_product(adapter, name, "bias"))


def _wholes(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    for role, end in {**_WHOLE, **_SAVED}.items():
        if role in adapter.modules[name].keys:
            place, shown = (tensor, name) if end == _WEIGHT else (_bias(tensor), f"{name} (bias)")
            shown = (
                f"{name} (difference)"
                if shown == name and _PRODUCTS.keys() & adapter.modules[name].keys.keys()
                else shown
            )
            if role in _SAVED:
                yield Change(shown, name, place, scaled=False, saved=role)
            else:
                yield Change(shown, name, place, lambda role=role: whole_product(adapter, name, role), scaled=False)  # type: ignore[misc]


def _unread(adapter: LoraAdapter, name: str, tensor: str | None) -> Iterator[Change]:
    keys = adapter.modules[name].keys
    for role, again in TWICE.items():
        if again in keys and not torch.equal(adapter.part(name, role), adapter.part(name, again)):
            yield Change(
                name, name, tensor, unread=f"{printable(keys[again], 80)} differs from {printable(keys[role], 80)}"
            )
    for role, what in _NOT_READ.items():
        if role in adapter.modules[name].keys:
            yield Change(name, name, tensor, unread=f"{what} is no update with a scale")
            return


def _bias(tensor: str | None) -> str | None:
    return None if tensor is None else tensor.removesuffix(_WEIGHT) + _BIAS


def unused_keys(adapter: LoraAdapter, base: Weights) -> Iterator[Change]:
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


def merged_layer(adapter: LoraAdapter, change: Change, base: Weights, merged: Weights) -> MergedLayer | None:
    """Return the layer of a change that has a product and a tensor, or None when their shapes do not fit."""
    assert change.product is not None
    assert change.tensor is not None
    module, tensor = adapter.modules[change.module], change.tensor
    product = change.product().picked(change.parts)
    if change.stacks:
        product = product.turned() if change.turned else product
        if len(base.info(tensor).shape) > 2:
            tensor = [store.folded(tensor) for store in (base, merged)].pop()
    if "base_copy" in module.keys and base.info(tensor).shape != merged.info(tensor).shape:
        tensor = _copied(adapter, change.module, tensor, base, merged)
    fitted, turned = _fitted(adapter, module, product, (base.info(tensor), merged.info(tensor)))
    if fitted is None:
        return None
    if grid := merged.grid(tensor):
        fitted = ScaledProduct(fitted, grid.steps)
        tensor = [base.in_codes(tensor, grid), merged.in_codes(tensor, None)].pop()
    first = next(role for role in ("B", *module.keys) if role in module.keys and role != "alpha")
    dtype = str(adapter.part(change.module, first).dtype).removeprefix("torch.")
    parts = (tensor, base, merged, fitted, dtype)
    if not change.scaled or change.name.endswith("(bias)") or "magnitude" not in module.keys:
        return MergedLayer(*parts)
    magnitude = adapter.part(change.module, "magnitude")
    axis = _axis(tuple(magnitude.shape), product.shape, adapter.format)
    return None if axis is None else DoraLayer(*parts, magnitude, 1 - axis if turned else axis)


def _copied(adapter: LoraAdapter, name: str, tensor: str, base: Weights, merged: Weights) -> str:
    """Return a name for a grown vocabulary whose base the file holds: the copy in it instead of the checkpoint's."""
    copy, rows = adapter.part(name, "base_copy"), base.info(tensor).shape[0]
    first = copy[:rows].to(base.rows(tensor, 0, 1).dtype)
    if copy.shape != merged.info(tensor).shape or not torch.equal(first, base.rows(tensor, 0, len(first))):
        return tensor
    merged.hold(tensor, None)
    return base.hold(tensor, copy)


def _fitted(
    adapter: LoraAdapter, module: LoraModule, product: Product, infos: tuple[TensorInfo, TensorInfo]
) -> tuple[Product | None, bool]:
    """Return the product as the weight lies, and whether it was turned (Conv1D, embeddings); None: it fits nowhere.

    Of a vocabulary of another size it has the rows that both checkpoints have.
    """
    sizes = [(info.shape[0] if info.shape else 1, info.elements // max((*info.shape, 1)[0], 1)) for info in infos]
    table = module.variant == "embedding" or "lora_embedding_A" in module.keys.get("A", "")
    first = bool(adapter.config.get("fan_in_fan_out")) or table
    ways = [(product.turned() if turned else product, turned) for turned in (first, not first)]
    for shape in sizes:
        for way, turned in (each for each in ways if each[0].shape == shape):
            rows = min(size for size, _ in sizes)
            return (way if rows == shape[0] else way.sliced(0, rows)), turned
    return None, False


def _axis(magnitude: tuple[int, ...], shape: tuple[int, int], format: str) -> int | None:
    """Return the axis that a magnitude runs along: 0 the rows, 1 the columns; None when it fits neither.

    kohya's `dora_scale` says it by its shape, [out, 1] or [1, in]; PEFT's runs along the outputs.
    """
    count = math.prod(magnitude)
    fits = count == shape[0], count == shape[1]
    if all(fits):
        return int(format != "peft" and len(magnitude) > 1 and magnitude[0] == 1)
    return fits.index(True) if any(fits) else None
