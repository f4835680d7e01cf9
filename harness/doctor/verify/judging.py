"""From the tensors that one or several LoRAs change to what was found of each: the scale, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from harness.doctor.verify.changes import Change, merged_layer
from harness.doctor.verify.layer import DoraLayer, MergedLayer
from harness.doctor.verify.left_over import ROWS_LEFT, left_over, without_product
from harness.doctor.verify.measurement import MergeMeasurement
from harness.doctor.verify.measuring import measure, measure_fully
from harness.doctor.verify.mistakes import mistaken
from harness.doctor.verify.modules import BLENDED, Module, NotMeasured
from harness.doctor.verify.products import Total
from harness.doctor.verify.replaced import MethodLayer, judge_saved, judge_tokens
from harness.doctor.verify.shared import CannotMergeError
from harness.doctor.verify.untouched import component_of, requantised
from harness.doctor.verify.vote import DTYPES
from harness.doctor.verify.weights import Weights
from harness.files import LoraAdapter
from harness.law.probe import Probe
from harness.measure.tolerance import scale_rounding
from harness.text import printable

_LEAST = 1e-4  # a quotient of small integers in single precision, and the sample's own error
_ELEMENTS = 100_000
_NONE = 0.005  # of the expected scale
_NEAR = 0.02  # relative; how well the scales of several LoRAs are known from a regression
_REPLACED = ("set_weight", "set_bias")
_OVER = frozenset({"merged", "twice", "two roundings", "not merged", "hidden", "replaced"})  # what was added is known
Stores = tuple[Weights, Weights]


@dataclass(frozen=True)
class Given:
    """One LoRA and the strength that it was merged at."""

    adapter: LoraAdapter
    strength: float


@dataclass(frozen=True)
class ReadingMode:
    """How layers are read: all rows or a sample, products made on `device`; `tell` gets the name before each."""

    full: bool
    device: str
    tell: Callable[[str], None]

    def measure(self, layer: MergedLayer, expected: float) -> MergeMeasurement:
        """Measure one layer."""
        return measure_fully(layer, expected, self.device) if self.full and layer.streams else measure(layer, expected)


def judged(claims: Sequence[tuple[Given, Change]], stores: Stores, reading: ReadingMode) -> Iterator[Module]:
    """Yield what was found of one tensor, which one or several LoRAs change, or one in several ways."""
    reading.tell(claims[0][1].name)
    if len(claims) == 1:
        yield from _judged(*claims[0], stores, reading)
        return
    if saved := [claim for claim in claims if claim[1].saved in _REPLACED]:
        rest = [claim for claim in claims if claim not in saved]
        if len(saved) == 1 and rest and all(change.product for _, change in rest):
            yield from _over_saved(*saved[0], rest, stores, reading)
            return
    wanted = [_wanted(given.adapter, change, given.strength) for given, change in claims]
    problem = next(filter(None, (_unmeasured(change, stores) for _, change in claims)), None)
    if residual := next((change.residual for _, change in claims if change.residual), ""):
        problem = NotMeasured("unsupported", residual)
    layers = [] if problem else [_layer_of(given, change, stores) for given, change in claims]
    if problem is None and any(layer is None or isinstance(layer, DoraLayer) for layer in layers):
        problem = NotMeasured("ambiguous", "several updates change it, and not all of them by a sum")
    if problem:
        yield from (
            Module(probe, change.tensor, None, problem) for probe, (_, change) in zip(wanted, claims, strict=True)
        )
        return
    yield from _together(claims, wanted, [layer for layer in layers if layer], reading)


def _over_saved(
    given: Given, change: Change, rest: list[tuple[Given, Change]], stores: Stores, reading: ReadingMode
) -> Iterator[Module]:
    """Judge what is added to a tensor that the file replaces as well: to the saved one instead of the base's."""
    every = [(given, change), *rest]
    problem = next(filter(None, (_unmeasured(each, stores) for _, each in every)), None)
    wanted = [_wanted(one.adapter, each, one.strength) for one, each in every]
    if problem or change.tensor is None:
        yield from (Module(probe, change.tensor, None, problem) for probe in wanted)
        return
    saved = given.adapter.part(change.module, str(change.saved))
    stores[1].hold(change.tensor, None)
    held = stores[0].hold(change.tensor, saved)
    found = [*judged([(one, replace(each, tensor=held)) for one, each in rest], stores, reading)]
    yield from (replace(module, tensor=change.tensor) for module in found)
    measured = judge_saved(saved, change.tensor, *stores)
    if _OVER.issuperset(module.state for module in found):
        what = "a saved tensor, below what is added to it"
        measured = replace(measured, state="replaced", unmerged=(), damaged=(), replaces=what)
    yield Module(wanted[0], change.tensor, measured, dtype=stores[1].dtype(change.tensor))


def _layer_of(given: Given, change: Change, stores: Stores) -> MergedLayer | None:
    return merged_layer(given.adapter, change, *stores) if change.product else None


def _together(
    claims: Sequence[tuple[Given, Change]], wanted: list[Probe], layers: list[MergedLayer], reading: ReadingMode
) -> Iterator[Module]:
    """Measure the sum of several updates; where it is not as wanted, find the scale of each."""
    scales = [probe.expected for probe in wanted]
    layer, measured = _sum_of(layers, scales, reading)
    if measured.state not in ("hidden", "not merged", "not finite") and not _near(measured):
        scales = _separated(layers)
        layer, measured = _sum_of(layers, scales, reading)
    for probe, scale, (given, change), own in zip(wanted, scales, claims, layers, strict=True):
        factor = measured.scale * scale
        ends = sorted(end * scale for end in measured.interval)
        alone = replace(measured, scale=factor, interval=(ends[0], ends[1]), overlap=0.0, product=0.0)
        if abs(factor) <= _NEAR * abs(probe.expected) and measured.state in ("merged", "partly", "two roundings"):
            alone = replace(alone, state="not merged")  # the others explain the layer without it
        found = _found(probe, alone, own)
        if scale != probe.expected:
            found = replace(found, tolerance=max(found.tolerance, _NEAR * max(map(abs, scales))))
        lora = given.adapter.modules[change.module]
        yield Module(
            found, change.tensor, alone, dtype=layer.dtype,
            alpha_unknown=change.scaled and lora.rank > 0 and not lora.alpha and not lora.unscaled,
        )  # fmt: skip


def _near(measured: MergeMeasurement) -> bool:
    good = measured.state in ("merged", "partly", "damaged", "two roundings")
    return good and measured.interval[0] - _LEAST - _NEAR <= 1 <= measured.interval[1] + _LEAST + _NEAR


def _sum_of(
    layers: list[MergedLayer], scales: list[float], reading: ReadingMode
) -> tuple[MergedLayer, MergeMeasurement]:
    parts = tuple((layer.product, scale) for layer, scale in zip(layers, scales, strict=True))
    coarsest = max(layers, key=lambda layer: layer.roundoff)
    total = replace(coarsest, product=Total(parts), merges=len(parts))
    return total, reading.measure(total, 1.0)


def _separated(layers: list[MergedLayer]) -> list[float]:
    """Return the factor on the product of each LoRA by least squares over a sample."""
    samples = [layer.sample(_ELEMENTS) for layer in layers]
    products = np.stack([sample.product.ravel().astype(np.float64) for sample in samples], axis=1)
    change = samples[0].change.ravel().astype(np.float64)
    kept = np.isfinite(change) & np.isfinite(products).all(axis=1)
    found, *_ = np.linalg.lstsq(products[kept], change[kept], rcond=None)
    return [float(scale) for scale in found]


def _is_requantised(measured: MergeMeasurement, tensor: str, wanted: Probe, stores: Stores) -> bool:
    """Tell whether a weight is the base's, stored otherwise: nothing of the update is in it."""
    if not wanted.expected or stores[0].quantised(tensor) == stores[1].quantised(tensor):
        return False
    if measured.state == "unexplained":
        return requantised(*stores, tensor, (0, min(ROWS_LEFT, stores[0].info(tensor).shape[0])))
    return measured.state in ("merged", "two roundings", "mixed") and abs(measured.scale) <= _NONE * abs(
        wanted.expected
    )


def _of_squares(layer: MergedLayer, change: Change, adapter: LoraAdapter) -> bool:
    """Tell whether a layer stacks square experts of which nothing says how they lie."""
    experts = adapter.modules[change.module].experts if change.stacks and change.turned is None else 0
    return bool(experts) and layer.rows == experts * layer.columns


def _is_found(measured: MergeMeasurement) -> bool:
    """Tell whether a merge by this LoRA, as it was laid out, explains what is there."""
    return measured.state in ("merged", "partly", "damaged", "twice", "two roundings", "mixed")


def _judged(given: Given, change: Change, stores: Stores, reading: ReadingMode) -> Iterator[Module]:
    """Yield what was found of one change."""
    adapter, named, change = given.adapter, change.tensor, _widened(change, stores)
    wanted = _wanted(adapter, change, given.strength)
    problem = _unmeasured(change, stores)
    if problem or change.tensor is None:
        yield Module(wanted, change.tensor, None, problem)
    elif change.method:
        yield from _by_method(adapter, change, wanted, stores)
    elif change.saved:
        yield _saved(adapter, change, wanted, stores)
    else:
        yield replace(_module(adapter, change, wanted, stores, reading), tensor=named)


def _widened(change: Change, stores: Stores) -> Change:
    """Return the change of a layer that the merge has with more inputs, held against the base's with zeros for them."""
    tensor, (base, merged) = change.tensor, stores
    if change.product is None or tensor is None or not all(tensor in store.names for store in stores):
        return change
    old, new = base.info(tensor).shape, merged.info(tensor).shape
    if len(old) != 2 or len(new) != 2 or new[0] != old[0] or new[1] <= old[1] or change.product().shape != new:
        return change
    merged.hold(tensor, None)
    wide = torch.nn.functional.pad(base.whole(tensor), (0, new[1] - old[1]))
    return replace(change, tensor=base.hold(tensor, wide))


def _by_method(adapter: LoraAdapter, change: Change, wanted: Probe, stores: Stores) -> Iterator[Module]:
    assert change.tensor is not None
    bias = change.tensor.removesuffix(".weight") + ".bias"
    tensors = {"weight": change.tensor} | ({"bias": bias} if all(bias in store.names for store in stores) else {})
    dtype = stores[1].dtype(change.tensor)
    try:
        if wanted.strength != 1:
            raise CannotMergeError(f"PEFT has no strength for {adapter.kind}")
        for tensor, measured in MethodLayer(adapter, change.module, tensors, change.largest).judged(*stores):
            shown = wanted if tensor == change.tensor else replace(wanted, module=f"{wanted.module} (bias)")
            yield Module(shown, tensor, measured, dtype=dtype)
    except CannotMergeError as why:
        yield Module(wanted, change.tensor, None, NotMeasured("unsupported", printable(why, 200)))


def _saved(adapter: LoraAdapter, change: Change, wanted: Probe, stores: Stores) -> Module:
    """Compare a tensor that the file saved whole, or rows of it."""
    assert change.tensor is not None
    assert change.saved is not None
    saved, shape = adapter.part(change.module, change.saved), stores[1].info(change.tensor).shape
    if saved.shape[1:] != shape[1:] or saved.dim() != len(shape):
        what = f"the saved tensor {list(saved.shape)} does not fit the weight {list(shape)}"
        return Module(wanted, change.tensor, None, NotMeasured("misfit", what))
    if change.saved != "token_rows":
        measured = judge_saved(saved, change.tensor, *stores)
    else:
        rows = adapter.token_indices(change.module)
        if len(rows) != len(saved) or change.tensor not in stores[0].names:
            what = "which rows of the embedding these are is not said by any configuration"
            return Module(wanted, change.tensor, None, NotMeasured("ambiguous", what))
        measured = judge_tokens(saved, rows, change.tensor, *stores)
    fault = None if bool(torch.isfinite(saved.float()).all()) else ("LH707", "NaN or infinite weights in the LoRA")
    return Module(wanted, change.tensor, measured, dtype=stores[1].dtype(change.tensor), fault=fault)


def _module(adapter: LoraAdapter, change: Change, wanted: Probe, stores: Stores, reading: ReadingMode) -> Module:
    """Measure one tensor that a module changes."""
    assert change.tensor is not None
    layer = merged_layer(adapter, change, *stores)
    if layer is None:
        shape = "x".join(map(str, stores[0].info(change.tensor).shape))
        return Module(
            wanted, change.tensor, None, NotMeasured("misfit", f"the update does not fit the weight [{shape}]")
        )
    measured = reading.measure(layer, wanted.expected)
    # a strength other than 1 may stand outside DoRA's norm; what it means there is left to the merger
    blends = wanted.strength not in (0.0, 1.0) and layer.blends(wanted.expected / wanted.strength, wanted.strength)
    if blends:
        scale = wanted.expected
        measured = replace(measured, state="merged", scale=scale, interval=(scale, scale), overlap=0.0, product=0.0)
    if _is_requantised(measured, change.tensor, wanted, stores):
        measured = replace(measured, state="not merged", scale=0.0)
    if change.residual and measured.state != "not merged":
        return Module(wanted, change.tensor, None, NotMeasured("unsupported", change.residual))
    fault = None if blends else _fault(layer, measured)
    if measured.state == "hidden" and (measured.product == 0 or not wanted.strength):
        measured, fault = without_product(layer, measured, due=bool(wanted.strength))
    other = None if change.parts else mistaken(layer, measured, wanted.expected, reading.measure)
    if _of_squares(layer, change, adapter) and (other or _is_found(measured)):
        what = "the experts are square: whether they lie as [out, in] or [in, out] cannot be told"
        return Module(wanted, change.tensor, None, NotMeasured("ambiguous", what))
    if other:
        measured, fault = other
    note = BLENDED if blends else left_over(layer, measured)
    lora = adapter.modules[change.module]
    unknown = change.scaled and lora.rank > 0 and not lora.alpha and not lora.unscaled
    return Module(
        _found(wanted, measured, layer), change.tensor, measured,
        dtype=layer.dtype, fault=fault, note=note, alpha_unknown=unknown,
        expert_rows=layer.rows // lora.experts if lora.variant == "experts" else 0,
    )  # fmt: skip


def _fault(layer: MergedLayer, measured: MergeMeasurement) -> tuple[str, str] | None:
    """Return the code and the sentence of what is wrong beside the scale; None when nothing is."""
    if measured.state == "not finite":
        return None if layer.update_is_finite() else ("LH707", "NaN or infinite weights in the LoRA")
    if measured.state in ("merged", "partly", "damaged", "two roundings", "mixed"):
        said = layer.fault(measured.scale)
        return ("LH304", said) if said else None
    return None


def _wanted(adapter: LoraAdapter, change: Change, strength: float) -> Probe:
    """Return what the scale should come from; a whole difference has the strength alone."""
    lora = adapter.modules.get(change.module)
    if lora is None or not change.scaled or not lora.rank or change.method:
        return Probe(change.name, strength, 0, (None,), (1,), 0.0, 0.0)
    scaled = {name: module for name, module in adapter.modules.items() if module.rank}
    alphas = tuple(module.alpha for module in scaled.values())
    ranks, place = tuple(module.rank for module in scaled.values()), list(scaled).index(change.module)
    fused = "qkv" in lora.name.rpartition(".")[2]
    return Probe(change.name, strength, place, alphas, ranks, 0.0, 0.0, fused=fused, root=lora.rslora)


def _found(wanted: Probe, measured: MergeMeasurement, layer: MergedLayer) -> Probe:
    spread = max(measured.interval[1] - measured.scale, measured.scale - measured.interval[0], 0.0)
    rounding = max(scale_rounding(layer.dtype), scale_rounding(layer.lora_dtype), _LEAST)
    slack = spread + rounding * abs(measured.scale)
    return replace(wanted, measured=measured.scale, tolerance=slack, dtype=layer.dtype)


def _unmeasured(change: Change, stores: Stores) -> NotMeasured | None:
    """Say why a tensor cannot be measured; None when it can."""
    if change.unread:
        return NotMeasured(change.kind, change.unread)  # type: ignore[arg-type]
    if change.tensor is None:
        return NotMeasured("missing layer", "no layer of this name in the base")
    if change.saved and change.tensor in stores[1].names:
        return _odd_dtype([stores[1].dtype(change.tensor)])
    whole = change.tensor.partition("[")[0]
    if why := next((why for store in stores if whole in store.names and (why := store.unreadable(whole))), None):
        return NotMeasured("quantised", why)
    if whole in stores[1].names and (how := stores[1].quantised(whole)) and not _has_steps(change, stores[1]):
        what = f"the merged weight is stored as {how}, whose rounding is not known here"
        return NotMeasured("quantised", f"{what}: the merge as it was before it was stored so would decide")
    if whole not in stores[0].names:
        return NotMeasured("missing tensor", "the layer has no such tensor in the base")
    return None if change.tensor in stores[0].held else _misfit(whole, *stores)


def _misfit(tensor: str, base: Weights, merged: Weights) -> NotMeasured | None:
    if tensor not in merged.names:
        component = component_of(base.store, tensor)
        if component and all(component_of(merged.store, name) != component for name in merged.store.names):
            return NotMeasured("component", f"the component {component} is not in the merged checkpoint")
        return NotMeasured("misfit", "the merged checkpoint lacks this weight")
    first, second = base.info(tensor).shape, merged.info(tensor).shape
    if first[1:] != second[1:] or (first != second and len(first) != 2):
        return NotMeasured("misfit", "the merged weight has another shape than the base's")
    return _odd_dtype([base.dtype(tensor), merged.dtype(tensor)])


def _has_steps(change: Change, merged: Weights) -> bool:
    """Tell whether the rounding of a quantised weight is known: whole numbers, or numbers of eight bits, of steps."""
    return change.product is not None and change.tensor is not None and merged.grid(change.tensor) is not None


def _odd_dtype(dtypes: list[str]) -> NotMeasured | None:
    odd = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    return NotMeasured("quantised", f"{odd[0]} weights are not read") if odd else None
