"""Is a merged checkpoint really base + strength * alpha / rank * B @ A? Per module and overall, through rounding."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.layers import layer_of
from harness.doctor.verify.changes import Piece, pieces, strangers
from harness.doctor.verify.dora import DoraLayer
from harness.doctor.verify.layer import Layer
from harness.doctor.verify.merged_layer import Baked, measure, measure_fully
from harness.doctor.verify.modules import BLENDED, NO_TENSOR, Module, module_verdict
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

OnModule = Callable[[str], None]
_LEAST = 1e-4  # a quotient of small integers in single precision, and the sample's own error
_SCALED = (".weight_scale", ".scale_weight", ".weight_scale_inv", ".weight.absmax")


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


def verify_merge(
    base: Path | str,
    merged: Path | str,
    lora: Path | str,
    *,
    strength: float = 1.0,
    full: bool = False,
    lora_alpha: float | None = None,
    device: str = "cpu",
    on_module: OnModule = lambda name: None,
) -> MergeReport:
    """Measure the scale that was baked into `merged` for every module of `lora`; one module is in memory at a time.

    `base` and `merged` are safetensors files, folders of them, or `*.safetensors.index.json`. Rows are sampled from
    every fused slice; `full` reads everything. Pairs, convolutions, Tucker cores, LoHa, LoKr, DoRA, whole differences
    and biases are measured; whatever else the file holds is a skipped verdict that says so. `lora_alpha` is the alpha
    of the training for a file that carries none. `device` makes the products of a full read.

    Raises:
        UserError: a file cannot be read, no module of the LoRA is in the base, or there is no such device.
    """
    _usable(device)
    adapter = read_lora(lora)
    before, after = Checkpoint.open(base), Checkpoint.open(merged)
    matched = before.match(adapter)
    if not matched:
        raise UserError(_no_match(adapter, before))
    found = []
    for piece in _pieces(adapter, before, matched):
        on_module(piece.name)
        found.append(_module(adapter, piece, (before, after), strength, full, lora_alpha, device))
    touched = frozenset(module.tensor for module in found if module.tensor)
    untouched = compare_untouched(before, after, touched, full=full)
    command = _command(base, merged, lora, strength, full)
    return _report(adapter, found, untouched, Path(merged).name, command)


def _usable(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r}: {printable(error, 120)}") from None


def _pieces(adapter: LoraAdapter, base: Checkpoint, matched: dict[str, str]) -> Iterator[Piece]:
    for name in adapter.modules:
        yield from pieces(adapter, name, matched.get(name))
    yield from strangers(adapter, base)


def _module(
    adapter: LoraAdapter,
    piece: Piece,
    stores: tuple[Checkpoint, Checkpoint],
    strength: float,
    full: bool,
    lora_alpha: float | None,
    device: str,
) -> Module:
    """Measure one tensor that a module changes, or say why it cannot be."""
    wanted = _wanted(adapter, piece, strength, lora_alpha)
    problem = _unreadable(piece, stores)
    if problem or piece.tensor is None:
        return Module(wanted, piece.tensor, None, problem)
    layer = layer_of(adapter, piece, *stores)
    if layer is None:
        shape = "x".join(map(str, stores[0].info(piece.tensor).shape))
        return Module(wanted, piece.tensor, None, f"the update does not fit the weight [{shape}]")
    every = full and layer.streams
    baked = measure_fully(layer, wanted.expected, device) if every else measure(layer, wanted.expected)
    blends = _blends(layer, wanted)
    if blends:
        scale = wanted.expected
        baked = replace(baked, state="merged", scale=scale, interval=(scale, scale), overlap=0.0, product=0.0)
    fault = None if blends else _fault(layer, baked)
    for store in stores:
        store.release()
    note = BLENDED if blends else None
    return Module(_found(wanted, baked, layer), piece.tensor, baked, dtype=layer.dtype, fault=fault, note=note)


def _blends(layer: Layer, wanted: Probe) -> bool:
    """Tell whether a strength other than 1 stands outside DoRA's norm; what it means there is left to the merger."""
    if not isinstance(layer, DoraLayer) or wanted.strength in (0.0, 1.0):
        return False
    return layer.blends(wanted.expected / wanted.strength, wanted.strength)


def _fault(layer: Layer, baked: Baked) -> tuple[str, str] | None:
    """Return the code and the sentence of what is wrong beside the scale; None when nothing is."""
    if baked.state == "not finite":
        return None if layer.update_is_finite() else ("LH707", "NaN or infinite weights in the LoRA")
    if isinstance(layer, DoraLayer) and baked.state in ("merged", "partly", "two roundings", "mixed"):
        said = layer.fault(baked.scale)
        return ("LH304", said) if said else None
    return None


def _wanted(adapter: LoraAdapter, piece: Piece, strength: float, lora_alpha: float | None) -> Probe:
    """Return what the scale should come from; a whole difference has the strength alone."""
    lora = adapter.modules.get(piece.module)
    if lora is None or not piece.scaled or not lora.rank:
        return Probe(piece.name, strength, 0, (None,), (1,), 0.0, 0.0)
    scaled = {name: module for name, module in adapter.modules.items() if module.rank}
    alphas = tuple(lora_alpha if module.alpha is None else module.alpha for module in scaled.values())
    ranks, place = tuple(module.rank for module in scaled.values()), list(scaled).index(piece.module)
    fused = "qkv" in lora.name.rpartition(".")[2]
    return Probe(piece.name, strength, place, alphas, ranks, 0.0, 0.0, fused=fused, root=lora.rslora)


def _found(wanted: Probe, baked: Baked, layer: Layer) -> Probe:
    spread = max(baked.interval[1] - baked.scale, baked.scale - baked.interval[0], 0.0)
    rounding = max(scale_rounding(layer.dtype), scale_rounding(layer.lora_dtype), _LEAST)
    return replace(wanted, measured=baked.scale, tolerance=spread + rounding * abs(baked.scale), dtype=layer.dtype)


def _unreadable(piece: Piece, stores: tuple[Checkpoint, Checkpoint]) -> str | None:
    """Say why a tensor cannot be measured; None when it can."""
    if piece.skipped:
        return piece.skipped
    if piece.tensor is None:
        return "no layer of this name in the base"
    if piece.tensor not in stores[0].names:
        return NO_TENSOR
    if any(piece.tensor.removesuffix(".weight") + tail in store.names for store in stores for tail in _SCALED):
        return "skipped: the weight is stored with a separate quantisation scale"
    return _misfit(piece.tensor, *stores)


def _misfit(tensor: str, base: Checkpoint, merged: Checkpoint) -> str | None:
    if tensor not in merged.names:
        return "the merged checkpoint lacks this weight"
    if base.info(tensor).shape != merged.info(tensor).shape:
        return "the merged weight has another shape than the base's"
    odd = [str(dtype) for dtype in (base.dtype(tensor), merged.dtype(tensor)) if dtype not in DTYPES]
    return f"skipped: {odd[0]} weights are not read" if odd else None


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


def _command(base: Path | str, merged: Path | str, lora: Path | str, strength: float, full: bool) -> str:
    parts = ["lora-harness", "verify", "--base", str(base), "--merged", str(merged), "--lora", str(lora)]
    parts += ["--strength", f"{strength:g}"] if strength != 1 else []
    return shlex.join([*parts, "--full"] if full else parts)
