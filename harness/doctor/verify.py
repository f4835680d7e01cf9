"""Is a merged checkpoint really base + strength * alpha / rank * B @ A? Per module and overall, through rounding."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness.checks.verdict import LawRecord, Verdict
from harness.doctor.baked import Baked, measure, measure_fully
from harness.doctor.baked_law import ScaleFound, name_law, scale_slack
from harness.doctor.checkpoint import Checkpoint
from harness.doctor.layer import Layer
from harness.doctor.merge_overall import overall_verdict
from harness.doctor.merge_verdicts import Module, module_verdict
from harness.doctor.untouched import Untouched, compare_untouched
from harness.doctor.vote import DTYPES
from harness.errors import UserError
from harness.files import LoraAdapter, read_lora
from harness.files.text import count, printable

OnModule = Callable[[str], None]
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
    on_module: OnModule = lambda name: None,
) -> MergeReport:
    """Measure the scale that was baked into `merged` for every module of `lora`; one module is in memory at a time.

    `base` and `merged` are safetensors files, folders of them, or `*.safetensors.index.json`. Rows are sampled from
    every fused slice; `full` reads everything. `lora_alpha` is the alpha of the training for a file that carries none.

    Raises:
        UserError: a file cannot be read, or no module of the LoRA is in the base.
    """
    adapter = read_lora(lora)
    before, after = Checkpoint.open(base), Checkpoint.open(merged)
    matched = before.match(adapter)
    if not matched:
        raise UserError(_no_match(adapter, before))
    found = []
    for name in adapter.modules:
        on_module(name)
        found.append(_module(adapter, name, matched.get(name), (before, after), strength, full, lora_alpha))
    untouched = compare_untouched(before, after, frozenset(matched.values()), full=full)
    command = _command(base, merged, lora, strength, full)
    return _report(adapter, found, untouched, Path(merged).name, command)


def _module(
    adapter: LoraAdapter,
    name: str,
    tensor: str | None,
    stores: tuple[Checkpoint, Checkpoint],
    strength: float,
    full: bool,
    lora_alpha: float | None,
) -> Module:
    """Measure one module, or say why it cannot be."""
    lora = adapter.modules[name]
    alpha = lora_alpha if lora.alpha is None else lora.alpha
    wanted = ScaleFound(name, 0.0, 0.0, strength, alpha, lora.rank, lora.rslora)
    problem = _unreadable(adapter, name, tensor, stores)
    if problem or tensor is None:
        return Module(wanted, tensor, None, problem)
    layer = Layer.of(adapter, name, tensor, *stores)
    if layer is None:
        shape = "x".join(map(str, stores[0].info(tensor).shape))
        return Module(wanted, tensor, None, f"B @ A does not fit the weight [{shape}]")
    baked = (measure_fully if full else measure)(layer, wanted.expected)
    for store in stores:
        store.release()
    return Module(_found(wanted, baked, layer), tensor, baked, dtype=layer.dtype)


def _found(wanted: ScaleFound, baked: Baked, layer: Layer) -> ScaleFound:
    spread = max(baked.interval[1] - baked.scale, baked.scale - baked.interval[0], 0.0)
    slack = spread + scale_slack(layer.dtype, layer.lora_dtype, baked.scale)
    return replace(wanted, scale=baked.scale, slack=slack)


def _unreadable(
    adapter: LoraAdapter, name: str, tensor: str | None, stores: tuple[Checkpoint, Checkpoint]
) -> str | None:
    """Say why a module cannot be measured; None when it can."""
    module = adapter.modules[name]
    if tensor is None:
        return "no layer of this name in the base"
    if not {"A", "B"} <= set(module.keys) or "mid" in module.keys or module.variant == "dora":
        return f"skipped: a {module.variant} update is not a multiple of B @ A"
    if any(tensor.removesuffix(".weight") + tail in store.names for store in stores for tail in _SCALED):
        return "skipped: the weight is stored with a separate quantisation scale"
    return _misfit(tensor, *stores)


def _misfit(tensor: str, base: Checkpoint, merged: Checkpoint) -> str | None:
    if tensor not in merged.names:
        return "the merged checkpoint lacks this weight"
    if base.info(tensor).shape != merged.info(tensor).shape:
        return "the merged weight has another shape than the base's"
    odd = [str(dtype) for dtype in (base.dtype(tensor), merged.dtype(tensor)) if dtype not in DTYPES]
    return f"skipped: {odd[0]} weights are not read" if odd else None


def _report(adapter: LoraAdapter, found: list[Module], untouched: Untouched, loader: str, command: str) -> MergeReport:
    law, code = _law(found)
    frame = {"loader": loader, "format": adapter.format, "reproduce": command}
    modules = tuple(module_verdict(module, code, frame) for module in found)
    return MergeReport(modules, overall_verdict(found, modules, untouched, (law, code), frame), tuple(found), untouched)


def _law(found: list[Module]) -> tuple[LawRecord | None, str | None]:
    """Return the law of all modules whose scale is known; where none holds for all, that of those that are wrong."""
    twice = [module for module in found if module.state == "twice"]
    told = [module.found for module in found if module.tells_scale and module.state != "twice"]
    if not told:
        return name_law([module.found for module in twice], twice=True) if twice else (None, None)
    law, code = name_law(told)
    wrong = [one for one in told if not one.right]
    return name_law(wrong) if code == "LH209" and len(wrong) < len(told) else (law, code)


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
