"""Is a merged checkpoint really base + strength * alpha / rank * B @ A? Per module and overall, through rounding."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.match import Placement
from harness.doctor.verify.changes import Change, changes, merged_layer, slots_of, unused_keys
from harness.doctor.verify.layer import MergedLayer
from harness.doctor.verify.measurement import MergeMeasurement, measure, measure_fully
from harness.doctor.verify.modules import BLENDED, UNJUDGED, Module, NotMeasured, Unjudged, module_verdict
from harness.doctor.verify.overall import overall_verdict
from harness.doctor.verify.pairing import Untouched, Weights, compare_untouched, paired
from harness.doctor.verify.replaced import CannotMergeError, MethodLayer, judge_saved, judge_tokens
from harness.doctor.verify.vote import DTYPES
from harness.errors import UserError
from harness.files import LoraAdapter, read_lora, with_alpha
from harness.law.diagnosis import Diagnosis, diagnose
from harness.law.probe import Probe
from harness.measure.tolerance import scale_rounding
from harness.text import count, printable
from harness.verdict.verdict import Verdict

_LEAST = 1e-4  # a quotient of small integers in single precision, and the sample's own error
_SCALED = (".weight_scale", ".scale_weight", ".weight_scale_inv", ".weight.absmax")
_FOREIGN = "is of a component that this base does not have"
Stores = tuple[Weights, Weights]


@dataclass(frozen=True)
class MergeReport:
    """What `verify_merge` found: a verdict per module, the overall one, and the numbers behind them."""

    modules: tuple[Verdict, ...]
    overall: Verdict
    measured: tuple[Module, ...]
    untouched: Untouched

    @property
    def ok(self) -> bool:
        """True when every trained weight of the file was judged right and nothing else changed."""
        return self.overall.outcome == "passed"

    @property
    def exit_code(self) -> int:
        """0 right, 1 wrong, 3 when nothing is wrong and something was not judged."""
        return {"passed": 0, "failed": 1}.get(self.overall.outcome, 3)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Every verdict, the overall one last."""
        return (*self.modules, self.overall)


@dataclass(frozen=True)
class VerifyOptions:
    """How a merge is verified.

    `strength` is what the merge was asked for. `full` judges every row instead of a sample from every fused slice.
    `lora_alpha` is the alpha of the training for a file that carries none, or 0. `allow_unjudged` are the kinds of
    what is not judged that may pass. `device` makes the products of a full read. `on_module` gets the name of each
    tensor before it is measured.
    """

    strength: float = 1.0
    full: bool = False
    lora_alpha: float | None = None
    allow_unjudged: tuple[Unjudged, ...] = ()
    device: str = "cpu"
    on_module: Callable[[str], None] = lambda name: None


def verify_merge(
    base: Path | str, merged: Path | str, lora: Path | str, options: VerifyOptions | None = None, **fields: Any
) -> MergeReport:
    """Measure what was done to every tensor that `lora` trained; one module is in memory at a time.

    `base` and `merged` are safetensors files, folders of them, or `*.safetensors.index.json`; their names and fusions
    may differ. Pairs, convolutions, Tucker cores, LoHa, LoKr, DoRA, experts, whole differences and biases have a scale;
    saved tensors and token rows are compared bit by bit; other methods of PEFT with PEFT's own merge of the layer.
    Whatever else the file holds is a skipped verdict that says so. The fields of `options` may be given by keyword.

    Raises:
        UserError: a file cannot be read, no module of the LoRA is in the base, or there is no such device.
    """
    options = replace(options or VerifyOptions(), **fields)
    _usable(options)
    adapter = with_alpha(read_lora(lora), options.lora_alpha)
    stores = paired(Checkpoint.open(base), Checkpoint.open(merged), adapter)
    placement = stores[0].place(adapter)
    if not placement.slots and not placement.misfits and not placement.ambiguous:
        raise UserError(_no_match(adapter, stores[0]))
    found: list[Module] = []
    for change in _changes(adapter, stores, placement):
        options.on_module(change.name)
        found += _judged(adapter, change, stores, options)
    touched = _touched(stores, found)
    untouched = compare_untouched(*stores, touched, full=options.full)
    return _report(adapter, found, untouched, Path(merged).name, _command(base, merged, lora, options), options)


def _touched(stores: Stores, found: list[Module]) -> dict[str, list[tuple[int, int]] | None]:
    """Return the rows of every tensor that the LoRA names; None where it names all of them."""
    touched: dict[str, list[tuple[int, int]] | None] = {}
    for module in found:
        if module.tensor is None:
            continue
        name, _, rows = module.tensor.partition("[")
        if not rows or rows == "*]":
            touched |= {name: None, stores[0].owner(name): None}  # a head may be the embedding
        elif (runs := touched.setdefault(name, [])) is not None:
            start, stop = rows.rstrip("]").split(":")
            runs.append((int(start), int(stop)))
    return touched


def _usable(options: VerifyOptions) -> None:
    odd = [kind for kind in options.allow_unjudged if kind not in UNJUDGED]
    if odd:
        raise UserError(f"allow_unjudged={odd[0]!r}: the kinds are {', '.join(UNJUDGED)}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {options.device!r}: {printable(error, 120)}") from None


def _changes(adapter: LoraAdapter, stores: Stores, placement: Placement) -> Iterator[Change]:
    """Yield every tensor, or rows of one, that the file changes."""
    layers = stores[0].layers
    shapes = [stores[0].info(layers[slot.layer]).shape for slots in placement.slots.values() for slot in slots]
    wide = [shape for shape in shapes if len(shape) > 1]
    largest = max((shape[0] for shape in wide), default=1), max((shape[1] for shape in wide), default=1)
    for name in adapter.modules:
        slots = placement.slots.get(name, ())
        if not slots:
            yield from _homeless(adapter, name, stores, placement)
        else:
            for change in changes(adapter, name, layers[slots[0].layer]):
                yield from slots_of(replace(change, largest=largest), slots, stores)
    yield from unused_keys(adapter, stores[0])


def _homeless(adapter: LoraAdapter, name: str, stores: Stores, placement: Placement) -> Iterator[Change]:
    """Yield the changes of a module that has no place in the base: a saved one may be in the merged file alone."""
    if name in placement.ambiguous:
        yield Change(name, name, None, unread=placement.ambiguous[name], kind="ambiguous")
        return
    if name in placement.misfits:
        yield Change(name, name, None, unread=placement.misfits[name], kind="misfit")
        return
    module = adapter.modules[name]
    if module.variant in ("set", "tokens"):
        own = stores[1].place(replace(adapter, modules={name: module})).slots.get(name, ())
        if own:
            yield from changes(adapter, name, stores[1].layers[own[0].layer])
            return
    placed = {other.component for key, other in adapter.modules.items() if key in placement.slots}
    if module.component and placed and module.component not in placed:
        yield Change(name, name, None, unread=f"the component {module.component} is not in this base", kind="component")
        return
    yield from changes(adapter, name, None)


def _judged(adapter: LoraAdapter, change: Change, stores: Stores, options: VerifyOptions) -> Iterator[Module]:
    """Yield what was found of one change."""
    wanted = _wanted(adapter, change, options.strength)
    problem = _unmeasured(change, stores)
    if problem or change.tensor is None:
        yield Module(wanted, change.tensor, None, problem)
    elif change.method:
        yield from _by_method(adapter, change, wanted, stores)
    elif change.saved:
        yield _saved(adapter, change, wanted, stores)
    else:
        yield _module(adapter, change, wanted, stores, options)


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


def _module(adapter: LoraAdapter, change: Change, wanted: Probe, stores: Stores, options: VerifyOptions) -> Module:
    """Measure one tensor that a module changes."""
    assert change.tensor is not None
    layer = merged_layer(adapter, change, *stores)
    if layer is None:
        shape = "x".join(map(str, stores[0].info(change.tensor).shape))
        return Module(
            wanted, change.tensor, None, NotMeasured("misfit", f"the update does not fit the weight [{shape}]")
        )
    every = options.full and layer.streams
    measured = measure_fully(layer, wanted.expected, options.device) if every else measure(layer, wanted.expected)
    # a strength other than 1 may stand outside DoRA's norm; what it means there is left to the merger
    blends = wanted.strength not in (0.0, 1.0) and layer.blends(wanted.expected / wanted.strength, wanted.strength)
    if blends:
        scale = wanted.expected
        measured = replace(measured, state="merged", scale=scale, interval=(scale, scale), overlap=0.0, product=0.0)
    if measured.state == "hidden" and (measured.product == 0 or not wanted.strength):
        measured = replace(measured, state="replaced", replaces="nothing to merge, and nothing changed")
    fault = None if blends else _fault(layer, measured)
    for store in stores:
        store.release()
    note = BLENDED if blends else None
    lora = adapter.modules[change.module]
    unknown = change.scaled and lora.rank > 0 and not lora.alpha
    return Module(
        _found(wanted, measured, layer), change.tensor, measured,
        dtype=layer.dtype, fault=fault, note=note, alpha_unknown=unknown,
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
    if whole not in stores[0].names:
        return NotMeasured("missing tensor", "the layer has no such tensor in the base")
    if any(whole.removesuffix(".weight") + tail in store.names for store in stores for tail in _SCALED):
        return NotMeasured("quantised", "the weight is stored with a separate quantisation scale")
    return _misfit(whole, *stores)


def _misfit(tensor: str, base: Weights, merged: Weights) -> NotMeasured | None:
    if tensor not in merged.names:
        return NotMeasured("misfit", "the merged checkpoint lacks this weight")
    first, second = base.info(tensor).shape, merged.info(tensor).shape
    if first[1:] != second[1:] or (first != second and len(first) != 2):
        return NotMeasured("misfit", "the merged weight has another shape than the base's")
    return _odd_dtype([base.dtype(tensor), merged.dtype(tensor)])


def _odd_dtype(dtypes: list[str]) -> NotMeasured | None:
    odd = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    return NotMeasured("quantised", f"{odd[0]} weights are not read") if odd else None


def _report(
    adapter: LoraAdapter, found: list[Module], untouched: Untouched, loader: str, command: str, options: VerifyOptions
) -> MergeReport:
    law = _law(found)
    frame = {"loader": loader, "format": adapter.format, "reproduce": command}
    modules = tuple(module_verdict(module, law.code, frame) for module in found)
    overall = overall_verdict(found, modules, untouched, law, frame, allowed=options.allow_unjudged)
    return MergeReport(modules, overall, tuple(found), untouched)


def _law(found: list[Module]) -> Diagnosis:
    """Name the law of the modules whose scale is known; rounding that shows two merges decides between its readings."""
    found = [module for module in found if not module.alpha_unknown]
    twice = [module.found for module in found if module.state == "twice"]
    once = [module.found for module in found if module.tells_scale and module.state != "twice"]
    if once or not twice:
        return diagnose(once)
    law = diagnose([replace(probe, measured=probe.measured / 2) for probe in twice]).law
    return Diagnosis(law and replace(law, constant=2 * law.constant, others=()), "LH206")


def _no_match(adapter: LoraAdapter, base: Weights) -> str:
    names = _first(iter(adapter.modules)), _first(name for name in base.names if name.endswith(".weight"))
    return (
        f"{adapter.path}: none of its {count(len(adapter.modules), 'module')} (such as {names[0]}) is a layer of "
        f"{base.path} (such as {names[1]}): is it the model that the LoRA was trained on, and this component of it?"
    )


def _first(names: Iterator[str]) -> str:
    return printable(next(names, "none"), 80)


def _command(base: Path | str, merged: Path | str, lora: Path | str, options: VerifyOptions) -> str:
    parts = ["lora-harness", "verify", "--base", str(base), "--merged", str(merged), "--lora", str(lora)]
    parts += ["--strength", f"{options.strength:g}"] if options.strength != 1 else []
    parts += ["--lora-alpha", f"{options.lora_alpha:g}"] if options.lora_alpha is not None else []
    parts += [part for kind in options.allow_unjudged for part in ("--allow-unjudged", kind)]
    return shlex.join([*parts, "--full"] if options.full else parts)
