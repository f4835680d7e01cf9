"""Is a merged checkpoint really base + strength * alpha / rank * B @ A? Per module and overall, through rounding."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.changes import Change, changes, merged_layer, unused_keys
from harness.doctor.verify.layer import MergedLayer
from harness.doctor.verify.measurement import MergeMeasurement, measure, measure_fully
from harness.doctor.verify.modules import BLENDED, Module, NotMeasured, module_verdict
from harness.doctor.verify.overall import overall_verdict
from harness.doctor.verify.untouched import Untouched, compare_untouched
from harness.doctor.verify.vote import DTYPES
from harness.errors import UserError
from harness.files import LoraAdapter, read_lora
from harness.law.diagnosis import Diagnosis, diagnose
from harness.law.probe import Probe
from harness.measure.tolerance import scale_rounding
from harness.text import count, printable
from harness.verdict.verdict import Verdict

_LEAST = 1e-4  # a quotient of small integers in single precision, and the sample's own error


@dataclass(frozen=True)
class MergeReport:
    """What `verify_merge` found: a verdict per module, the overall one, and the numbers behind them."""

    modules: tuple[Verdict, ...]
    overall: Verdict
    measured: tuple[Module, ...]
    untouched: Untouched

    @property
    def ok(self) -> bool:
        """True when the merge is base + strength * alpha / rank * B @ A and nothing else, as far as it can be seen."""
        return self.overall.outcome == "passed"

    @property
    def exit_code(self) -> int:
        """0 right, 1 wrong, 2 when not one module could be measured."""
        return {"passed": 0, "failed": 1}.get(self.overall.outcome, 2)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Every verdict, the overall one last."""
        return (*self.modules, self.overall)


@dataclass(frozen=True)
class VerifyOptions:
    """How a merge is verified.

    `strength` is what the merge was asked for. `full` reads everything instead of a sample of rows from every fused
    slice. `lora_alpha` is the alpha of the training for a file that carries none. `device` makes the products of a full
    read. `on_module` gets the name of each tensor before it is measured.
    """

    strength: float = 1.0
    full: bool = False
    lora_alpha: float | None = None
    device: str = "cpu"
    on_module: Callable[[str], None] = lambda name: None


def verify_merge(
    base: Path | str, merged: Path | str, lora: Path | str, options: VerifyOptions | None = None, **fields: Any
) -> MergeReport:
    """Measure the scale that was baked into `merged` for every module of `lora`; one module is in memory at a time.

    `base` and `merged` are safetensors files, folders of them, or `*.safetensors.index.json`. Pairs, convolutions,
    Tucker cores, LoHa, LoKr, DoRA, whole differences and biases are measured; whatever else the file holds is a skipped
    verdict that says so. The fields of `options` may be given by keyword.

    Raises:
        UserError: a file cannot be read, no module of the LoRA is in the base, or there is no such device.
    """
    options = replace(options or VerifyOptions(), **fields)
    _usable(options.device)
    adapter = read_lora(lora)
    before, after = Checkpoint.open(base), Checkpoint.open(merged)
    matched = before.match(adapter)
    if not matched:
        raise UserError(_no_match(adapter, before))
    found = []
    for change in _changes(adapter, before, matched):
        options.on_module(change.name)
        found.append(_module(adapter, change, (before, after), options))
    touched = frozenset(module.tensor for module in found if module.tensor)
    untouched = compare_untouched(before, after, touched, full=options.full)
    command = _command(base, merged, lora, options)
    return _report(adapter, found, untouched, Path(merged).name, command)


def _usable(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r}: {printable(error, 120)}") from None


def _changes(adapter: LoraAdapter, base: Checkpoint, matched: dict[str, str]) -> Iterator[Change]:
    for name in adapter.modules:
        yield from changes(adapter, name, matched.get(name))
    yield from unused_keys(adapter, base)


def _module(
    adapter: LoraAdapter, change: Change, stores: tuple[Checkpoint, Checkpoint], options: VerifyOptions
) -> Module:
    """Measure one tensor that a module changes, or say why it cannot be."""
    wanted = _wanted(adapter, change, options.strength, options.lora_alpha)
    problem = _unmeasured(change, stores)
    if problem or change.tensor is None:
        return Module(wanted, change.tensor, None, problem)
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
    fault = None if blends else _fault(layer, measured)
    note = BLENDED if blends else None
    return Module(_found(wanted, measured, layer), change.tensor, measured, dtype=layer.dtype, fault=fault, note=note)


def _fault(layer: MergedLayer, measured: MergeMeasurement) -> tuple[str, str] | None:
    """Return the code and the sentence of what is wrong beside the scale; None when nothing is."""
    if measured.state == "not finite":
        return None if layer.update_is_finite() else ("LH707", "NaN or infinite weights in the LoRA")
    if measured.state in ("merged", "partly", "two roundings", "mixed"):
        said = layer.fault(measured.scale)
        return ("LH304", said) if said else None
    return None


def _wanted(adapter: LoraAdapter, change: Change, strength: float, lora_alpha: float | None) -> Probe:
    """Return what the scale should come from; a whole difference has the strength alone."""
    lora = adapter.modules.get(change.module)
    if lora is None or not change.scaled or not lora.rank:
        return Probe(change.name, strength, 0, (None,), (1,), 0.0, 0.0)
    scaled = {name: module for name, module in adapter.modules.items() if module.rank}
    alphas = tuple(lora_alpha if module.alpha is None else module.alpha for module in scaled.values())
    ranks, place = tuple(module.rank for module in scaled.values()), list(scaled).index(change.module)
    fused = "qkv" in lora.name.rpartition(".")[2]
    return Probe(change.name, strength, place, alphas, ranks, 0.0, 0.0, fused=fused, root=lora.rslora)


def _found(wanted: Probe, measured: MergeMeasurement, layer: MergedLayer) -> Probe:
    spread = max(measured.interval[1] - measured.scale, measured.scale - measured.interval[0], 0.0)
    rounding = max(scale_rounding(layer.dtype), scale_rounding(layer.lora_dtype), _LEAST)
    slack = spread + rounding * abs(measured.scale)
    return replace(wanted, measured=measured.scale, tolerance=slack, dtype=layer.dtype)


def _unmeasured(change: Change, stores: tuple[Checkpoint, Checkpoint]) -> NotMeasured | None:
    """Say why a tensor cannot be measured; None when it can."""
    if change.unread:
        return NotMeasured("not read", change.unread)
    if change.tensor is None:
        return NotMeasured("missing layer", "no layer of this name in the base")
    quantised = next((how for store in stores if (how := store.quantised(change.tensor))), None)
    if quantised:
        return NotMeasured("not read", f"{quantised} weights are not judged")
    if change.tensor not in stores[0].names:
        return NotMeasured("missing tensor", "the layer has no such tensor in the base")
    return _misfit(change.tensor, *stores)


def _misfit(tensor: str, base: Checkpoint, merged: Checkpoint) -> NotMeasured | None:
    if tensor not in merged.names:
        return NotMeasured("misfit", "the merged checkpoint lacks this weight")
    if base.info(tensor).shape != merged.info(tensor).shape:
        return NotMeasured("misfit", "the merged weight has another shape than the base's")
    odd = [str(dtype) for dtype in (base.dtype(tensor), merged.dtype(tensor)) if dtype not in DTYPES]
    return NotMeasured("not read", f"{odd[0]} weights are not read") if odd else None


def _report(adapter: LoraAdapter, found: list[Module], untouched: Untouched, loader: str, command: str) -> MergeReport:
    law = _law(found)
    frame = {"loader": loader, "format": adapter.format, "reproduce": command}
    modules = tuple(module_verdict(module, law.code, frame) for module in found)
    return MergeReport(modules, overall_verdict(found, modules, untouched, law, frame), tuple(found), untouched)


def _law(found: list[Module]) -> Diagnosis:
    """Name the law of the modules whose scale is known; rounding that shows two merges decides between its readings."""
    twice = [module.found for module in found if module.state == "twice"]
    once = [module.found for module in found if module.tells_scale and module.state != "twice"]
    if once or not twice:
        return diagnose(once)
    law = diagnose([replace(probe, measured=probe.measured / 2) for probe in twice]).law
    return Diagnosis(law and replace(law, constant=2 * law.constant, others=()), "LH206")


def _no_match(adapter: LoraAdapter, base: Checkpoint) -> str:
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
    return shlex.join([*parts, "--full"] if options.full else parts)
