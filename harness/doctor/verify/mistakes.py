"""Which mistake explains a layer that a LoRA's own update does not: turned, rows exchanged, components left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from harness.doctor.verify.changes import Change, merged_layer
from harness.doctor.verify.layer import MergedLayer, Sample, index_of
from harness.doctor.verify.measurement import ALIGNED, MOSTLY, MergeMeasurement, aligned
from harness.doctor.verify.modules import Module, few
from harness.doctor.verify.products import Experts, LowRank, Product
from harness.doctor.verify.rows import runs_of
from harness.doctor.verify.vote import Array
from harness.doctor.verify.weights import Weights
from harness.files import LoraAdapter

Measure = Callable[[MergedLayer, float], MergeMeasurement]
Fault = tuple[str, str]  # code and sentence
Stores = tuple[Weights, Weights]
_LOOKED_AT = 16_000  # elements
_PARTS = {2: "halves", 3: "thirds"}  # of the rows of a fused layer
_HEADS = (4, 8, 16, 32, 40, 48, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)  # rows of a head
_MOST_RANK = 256
_NEARLY_ALL = 0.95  # of ||ΔW||^2
_TRIED, _OWN = 4, 0.5  # layers; share of a change that lies along the update of one module alone
_OFF = 0.1  # of the factor on an expert's update
_THERE = (0.8, 1.25)  # of the scale; components that were merged lie between, those that were not are below its half


def mistaken(
    layer: MergedLayer, measured: MergeMeasurement, expected: float, measure: Measure
) -> tuple[MergeMeasurement, Fault] | None:
    """Return what a plain layer shows once a mistake is supposed that explains it, and the mistake; None: none does."""
    unknown = measured.state == "unexplained" or (measured.state == "mixed" and measured.explained < MOSTLY)
    unknown |= isinstance(layer.product, Experts) and measured.state in ("mixed", "damaged")
    if type(layer) is not MergedLayer or not unknown or measured.base != 1:
        return None
    sample = layer.sample(_LOOKED_AT)
    clean = sample.finite
    every = [
        (aligned(sample.change[clean], layer.sampled(product, _LOOKED_AT)[clean]), product, fault)
        for product, fault in _mistakes(layer, sample, expected)
    ]
    share, product, fault = max(every, key=itemgetter(0), default=(0.0, layer.product, ("", "")))
    if share < ALIGNED:
        return None
    found = measure(replace(layer, product=product), expected)
    if found.state == "mixed" and found.aligned > _NEARLY_ALL:  # rounded once more, on its way to the wrong rows
        found = replace(found, state="two roundings")
    return (found, fault) if found.state in ("merged", "two roundings") else None


def _mistakes(layer: MergedLayer, sample: Sample, expected: float) -> Iterator[tuple[Product, Fault]]:
    """Yield updates that mistakes make of the layer's own, with the code and the sentence of each."""
    own = layer.product
    if isinstance(own, Experts):
        yield from _among_experts(layer, own, sample, expected)
    turned = own.turned()
    if turned.shape == own.shape and turned is not own:
        yield turned, ("LH301", "the update was merged transposed")
    for order, said in _orders(own.shape[0]):
        yield own.at(order), ("LH302", said)
    if isinstance(own, LowRank) and (lost := _lost(layer, own, sample, expected)) is not None:
        kept = torch.from_numpy(~lost)
        runs = ", ".join(f"{a}" if b - a == 1 else f"{a} to {b - 1}" for a, b in runs_of(lost)[:4])
        what = f"component{'s' if lost.sum() > 1 else ''} {runs} of the {len(lost)} of its rank"
        yield LowRank(own.left[:, kept], own.right[kept]), ("LH304", f"merged without {what}")


def _orders(rows: int) -> Iterator[tuple[Tensor, str]]:
    """Yield orders that the rows of a layer are mistaken for: of each row the one whose update it got, and in words."""
    lines = torch.arange(rows)
    for count, what in _PARTS.items():
        for order in list(permutations(range(count)))[1:] if rows % count == 0 else ():
            said = " ".join(str(part + 1) for part in order)
            blocks = lines.reshape(count, -1)[list(order)].flatten()
            yield blocks, f"the {what} of its rows got the updates of {said}"
    for head in (head for head in _HEADS if rows % head == 0):
        for count, what in _PARTS.items():
            if rows % (count * head) == 0 and rows > count * head:
                in_turns = lines.reshape(count, -1, head).transpose(0, 1).flatten()
                yield in_turns, f"its rows got the updates of the {what} in turns, {head} rows of each"
                yield in_turns.argsort(), f"the {what} of its rows got what belongs to {head} rows of each in turns"
        pairs = lines.reshape(-1, 2, head // 2).mT.flatten()
        heads = f"in each head of {head} rows"
        yield pairs, f"{heads} the updates of the halves alternate, as rotary pairs in another layout"
        yield (
            pairs.argsort(),
            f"{heads} the halves got the updates of alternate rows, as rotary pairs in another layout",
        )


def _among_experts(
    layer: MergedLayer, own: Experts, sample: Sample, expected: float
) -> Iterator[tuple[Product, Fault]]:
    """Yield the update in which each expert has that of another, or a multiple of its own, as its sampled rows show."""
    seen = list(_of_experts(layer, own, sample, expected))
    origin, factor = [expert for expert, _ in seen], [times for _, times in seen]
    if others := [f"{expert} that of {other}" for expert, other in enumerate(origin) if expert != other]:
        order = torch.arange(own.shape[0]).reshape(len(seen), -1)[origin].flatten()
        yield own.at(order), ("LH104", f"experts hold the updates of others: {few(others, 'expert')}")
    elif off := [f"{expert} {times:.3g} times" for expert, times in enumerate(factor) if abs(times - 1) > _OFF]:
        twice = all(min(abs(times - 1), abs(times - 2)) <= _OFF for times in factor)
        scaled = Experts(own.left * torch.tensor(factor, dtype=own.left.dtype)[:, None, None], own.right)
        yield scaled, ("LH206" if twice else "LH209", f"the update is not once in every expert: {few(off, 'expert')}")


def _of_experts(layer: MergedLayer, own: Experts, sample: Sample, expected: float) -> Iterator[tuple[int, float]]:
    """Yield for each expert whose update its sampled rows hold, and how often; itself and once where none says."""
    number, height = own.left.shape[:2]
    owners, lines = sample.index // height, torch.arange(number * height)
    updates = [layer.sampled(own.at(lines.roll(-shift * height)), _LOOKED_AT) for shift in range(number)]
    for expert in range(number):
        rows = sample.finite & (owners == expert)
        shares = [aligned(sample.change[rows], update[rows]) if rows.any() else 0.0 for update in updates]
        best = int(np.argmax(shares))
        if shares[best] > _OWN:
            yield (expert + best) % number, _times(sample.change[rows], updates[best][rows]) / (expected or 1.0)
        else:
            yield expert, 1.0


def _times(change: Array, update: Array) -> float:
    return float((change * update).sum(dtype=np.float64) / np.square(update, dtype=np.float64).sum())


def _lost(
    layer: MergedLayer, own: LowRank, sample: Sample, expected: float
) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
    """Return which components b_k a_k^T are not in the layer where the others are; None where that is not so.

    Least squares over a sample: c = G^-1 h, G = (L^T L) * (R R^T), h_k = l_k^T dW r_k, with L and R those rows of B and
    columns of A.
    """
    rank = own.left.shape[1]
    if not 1 < rank <= _MOST_RANK or not expected:
        return None
    runs, columns = layer.grid(_LOOKED_AT)
    change = sample.change.astype(np.float64)
    left, right = own.left[index_of(runs)].double().numpy(), own.right[:, columns].double().numpy()
    if not np.isfinite(change).all():
        return None
    gram, along = (left.T @ left) * (right @ right.T), ((left.T @ change) * right).sum(axis=1)
    share = np.linalg.lstsq(gram, along, rcond=None)[0] / expected
    there = (share > _THERE[0]) & (share < _THERE[1])
    lost: np.ndarray[tuple[int], np.dtype[np.bool_]] = share < 0.5
    return lost if lost.any() and there.any() and (there | lost).all() else None


def with_origins(
    found: Sequence[Module], own: Mapping[str, tuple[LoraAdapter, Change]], stores: Stores
) -> list[Module]:
    """Name whose update the first layers hold that do not hold their own, of `own` changes by the names of modules."""
    strangers = [module for module in found if module.state == "unexplained" and not module.fault][:_TRIED]
    holds = {module.name: _origin(module.name, own, stores) for module in strangers if module.name in own}
    return [replace(module, holds=holds.get(module.name, "")) for module in found]


def _origin(name: str, own: Mapping[str, tuple[LoraAdapter, Change]], stores: Stores) -> str:
    """Return the module whose update a layer holds, empty where none is."""
    layer = merged_layer(*own[name], *stores)
    if type(layer) is not MergedLayer:
        return ""
    sample, best = layer.sample(_LOOKED_AT), ("", _OWN)
    for other, (adapter, change) in own.items():
        if other != name and change.product and _sizes(*own[name]) == _sizes(adapter, change):
            product = change.product()
            if product.shape == layer.product.shape:
                update = layer.sampled(product, _LOOKED_AT)[sample.finite]
                best = max(best, (other, aligned(sample.change[sample.finite], update)), key=itemgetter(1))
    return best[0]


def _sizes(adapter: LoraAdapter, change: Change) -> tuple[int, int]:
    module = adapter.modules[change.module]
    return module.out_features, module.in_features
