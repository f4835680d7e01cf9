"""Is a merged checkpoint really base + strength * alpha / rank * B @ A? Per module and overall, through rounding."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.inspect.in_peft import HEAD
from harness.doctor.inspect.targeting import targeted
from harness.doctor.match import Placement
from harness.doctor.verify.changes import Change, changes, experts_turned, slots_of, unused_keys
from harness.doctor.verify.judging import Given, ReadingMode, Stores, judged
from harness.doctor.verify.mistakes import with_origins
from harness.doctor.verify.modules import UNJUDGED, Module, Unjudged, module_verdict
from harness.doctor.verify.overall import overall_verdict
from harness.doctor.verify.pairing import is_left_over, paired
from harness.doctor.verify.untouched import Untouched, compare_untouched
from harness.doctor.verify.weights import Weights
from harness.errors import UserError
from harness.files import LoraAdapter, read_lora, with_alpha
from harness.law.diagnosis import Diagnosis, diagnose
from harness.text import count, printable
from harness.verdict.verdict import Verdict

Paths = Path | str | Sequence[Path | str]


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

    `strength` is what the merge was asked for, one number for every LoRA or one for each. `full` judges every row
    instead of a sample from every fused slice. `lora_alpha` is the alpha of the training for a file that carries none,
    or 0. `allow_unjudged` are the kinds of what is not judged that may pass. `device` makes the products of a full
    read. `on_module` gets the name of each tensor before it is measured.
    """

    strength: float | tuple[float, ...] = 1.0
    full: bool = False
    lora_alpha: float | None = None
    allow_unjudged: tuple[Unjudged, ...] = ()
    device: str = "cpu"
    on_module: Callable[[str], None] = lambda name: None


def verify_merge(
    base: Paths, merged: Path | str, lora: Paths, options: VerifyOptions | None = None, **fields: Any
) -> MergeReport:
    """Measure what was done to every tensor that `lora` trained; one module is in memory at a time.

    `base` and `merged` are safetensors files, folders of them, or `*.safetensors.index.json`; their names and fusions
    may differ. Of several bases the one that fits best is taken; several LoRAs are told apart where they change one
    tensor. Pairs, convolutions, Tucker cores, LoHa, LoKr, DoRA, experts, whole differences and biases have a scale;
    saved tensors and token rows are compared bit by bit; other methods of PEFT with PEFT's own merge of the layer.
    Whatever else a file holds is a skipped verdict that says so. The fields of `options` may be given by keyword.

    Raises:
        UserError: a file cannot be read, no module of a LoRA is in the base, or there is no such device.
    """
    options = replace(options or VerifyOptions(), **fields)
    _usable(options)
    bases, loras = _several(base), _several(lora)
    given = list(_given(loras, options))
    native = all(one.adapter.format == "gguf" for one in given)
    after = Checkpoint.open(merged, native=native)
    stores, notes = _best([Checkpoint.open(path, native=native) for path in bases], after, given)
    if all(map(is_left_over, after.names)):
        raise UserError(f"{after.path}: holds a LoRA alone, the checkpoint after the merge is needed")
    claims = _claims(given, stores)
    reading = ReadingMode(options.full, options.device, options.on_module)
    found = [module for claim in claims.values() for module in judged(claim, stores, reading)]
    if len(given) == 1:
        alone = (claim[0] for claim in claims.values() if len(claim) == 1 and claim[0][1].product)
        own = {change.name: (one.adapter, change) for one, change in alone if change.tensor}
        found = with_origins(found, own, stores)
    touched = {**_touched(stores, found), **_suspected(given, stores)}
    untouched = compare_untouched(*stores, touched, full=options.full)
    untouched = replace(untouched, notes=(*notes, *_tied_notes(after, found), *untouched.notes))
    command = _command(bases, merged, loras, options)
    return _report([one.adapter for one in given], found, untouched, Path(merged).name, command, options)


def _tied_notes(after: Checkpoint, found: Sequence[Module]) -> Iterator[str]:
    """Say that an embedding and the output layer are one weight, where one of them was merged."""
    if not after.config.get("tie_word_embeddings") or any(HEAD.search(f".{name}") for name in after.layers):
        return
    for module in found:
        is_head = bool(HEAD.search(f".{module.name}"))
        if is_head or "embed" in module.name.rpartition(".")[2]:
            other, own = ("embedding", "output layer") if is_head else ("output layer", "embedding")
            what = f"{printable(module.name, 80)} is the weight of the {other} too (tie_word_embeddings)"
            yield f"{what}: the merge changes both, the LoRA beside the model only the {own}"
            return


def _claims(given: list[Given], stores: Stores) -> dict[str, list[tuple[Given, Change]]]:
    """Return what the LoRAs change, by the tensor."""
    claims: dict[str, list[tuple[Given, Change]]] = {}
    owners: dict[str, set[tuple[str, int]]] = {}
    for index, one in enumerate(given):
        label = "" if len(given) == 1 else f"{one.adapter.path.name}: "
        for change in _changes(one.adapter, stores):
            key = change.tensor if change.tensor and not change.unread else f"{index} {change.name}"
            claims.setdefault(key, []).append((one, replace(change, name=label + change.name)))
            if change.tensor:
                owners.setdefault(stores[0].owner(change.tensor), set()).add((key, index))
    for shared in owners.values():
        if len({key for key, _ in shared}) > 1 and len({index for _, index in shared}) > 1:
            why = "another of the LoRAs changes other rows of the same tensor, which may overlap"
            for key, _ in shared:
                claims[key] = [(one, replace(change, unread=why, kind="ambiguous")) for one, change in claims[key]]
    return claims


def _several(paths: Paths) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _given(loras: Sequence[Path], options: VerifyOptions) -> Iterator[Given]:
    strengths = options.strength if isinstance(options.strength, tuple) else (options.strength,)
    if len(strengths) not in (1, len(loras)):
        raise UserError(
            f"{count(len(strengths), 'strength')} for {count(len(loras), 'LoRA')}: give one, or one for each"
        )
    for path, strength in zip(loras, strengths * (len(loras) if len(strengths) == 1 else 1), strict=True):
        yield Given(with_alpha(read_lora(path), options.lora_alpha), strength)


def _best(bases: list[Checkpoint], merged: Checkpoint, given: list[Given]) -> tuple[Stores, list[str]]:
    """Return the checkpoints as one, with the base in which the fewest tensors that no LoRA names differ."""
    found = []
    for base in bases:
        stores = paired(base, merged, [one.adapter for one in given])
        slots = [slot for one in given for some in stores[0].place(one.adapter).slots.values() for slot in some]
        if not slots and len(bases) > 1:
            found.append((1.0, "none of the modules is in it", stores))
            continue
        touched = dict.fromkeys(stores[0].layers[slot.layer] for slot in slots)
        if len(bases) == 1:
            return stores, []
        other = compare_untouched(*stores, touched)
        wrong = len(other.changed) + len(other.missing) + len(other.extra) + len(other.reshaped)
        total = max(other.compared + len(other.missing) + len(other.extra), 1)
        found.append((wrong / total, f"{wrong} of {total} tensors that no LoRA names differ", stores))
    least = min(one[0] for one in found)
    equal = [one for one in found if one[0] == least]
    if len(equal) > 1:
        return _best_by_modules([one[2] for one in equal], given)
    best = equal[0]
    others = [f"{one[2][0].path}: {one[1]}" for one in found if one is not best]
    return best[2], [f"of the bases given {best[2][0].path} fits best: {best[1]}; {'; '.join(others)}"]


def _best_by_modules(several: list[Stores], given: list[Given]) -> tuple[Stores, list[str]]:
    """Return the base from which most modules are merged, where no other tensor tells the bases apart."""
    counts = [_merged(stores, given) for stores in several]
    most = max(counts)
    best = several[counts.index(most)]
    said = "; ".join(f"{stores[0].path}: {number}" for stores, number in zip(several, counts, strict=True))
    if counts.count(most) > 1:
        return best, [f"the bases given cannot be told apart, {best[0].path} is taken (modules merged into it: {said})"]
    return best, [f"of the bases given {best[0].path} fits best (modules merged into it: {said})"]


def _merged(stores: Stores, given: list[Given]) -> int:
    """Return how many modules a sample shows to be merged into this base."""
    sampled = ReadingMode(False, "cpu", lambda name: None)
    found = (module for claim in _claims(given, stores).values() for module in judged(claim, stores, sampled))
    return sum(one.measured is not None and one.measured.state == "merged" for one in found)


def _touched(stores: Stores, found: list[Module]) -> dict[str, list[tuple[int, int]] | None]:
    """Return the rows of every tensor that the LoRA names; None where it names all of them."""
    touched: dict[str, list[tuple[int, int]] | None] = {}
    for module in found:
        if module.tensor is None:
            continue
        for name, run in stores[0].covered(module.tensor):
            if run is None:
                touched |= {name: None, stores[0].owner(module.tensor): None}  # a head may be the embedding
            elif (runs := touched.setdefault(name, [])) is not None:
                runs.append(run)
    return touched


def _suspected(given: list[Given], stores: Stores) -> dict[str, None]:
    """Return the tensors that a module whose place is not known may be meant to change."""
    layers = stores[0].layers
    suspects = [layer for one in given for layer in stores[0].place(one.adapter).suspects]
    weights = [layers[layer] for layer in suspects if layer in layers]
    return dict.fromkeys([*weights, *(f"{name.removesuffix('.weight')}.bias" for name in weights)])


def _usable(options: VerifyOptions) -> None:
    odd = [kind for kind in options.allow_unjudged if kind not in UNJUDGED]
    if odd:
        raise UserError(f"allow_unjudged={odd[0]!r}: the kinds are {', '.join(UNJUDGED)}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {options.device!r}: {printable(error, 120)}") from None


def _changes(adapter: LoraAdapter, stores: Stores) -> Iterator[Change]:
    """Yield every tensor, or rows of one, that the file changes.

    Raises:
        UserError: none of its modules is in the base.
    """
    layers, placement = stores[0].layers, stores[0].place(adapter)
    if not placement.slots and not placement.misfits and not placement.ambiguous:
        if placement.missing:
            raise UserError(_no_match(adapter, stores[0]))
        yield from _of_no_layer(adapter, layers)
        return
    shapes = [stores[0].info(layers[slot.layer]).shape for slots in placement.slots.values() for slot in slots]
    wide = [shape for shape in shapes if len(shape) > 1]
    turned = experts_turned(adapter, placement.slots, stores[0])
    largest = max((shape[0] for shape in wide), default=1), max((shape[1] for shape in wide), default=1)
    for name in adapter.modules:
        slots = placement.slots.get(name, ())
        if not slots:
            yield from _homeless(adapter, name, stores, placement)
        else:
            for change in changes(adapter, name, layers[slots[0].layer]):
                yield from slots_of(replace(change, largest=largest, turned=turned), slots, stores)
    yield from unused_keys(adapter, stores[0])


def _of_no_layer(adapter: LoraAdapter, layers: Mapping[str, str]) -> Iterator[Change]:
    """Yield the layers that the configuration targets, for a method whose parameters belong to no single layer."""
    kind, module = printable(adapter.kind, 40), next(iter(adapter.modules))
    what = f"{kind} has no parameters for single layers: PEFT's own merge of the whole model would decide"
    chosen = targeted(adapter)
    found = [(layer, name) for layer, name in layers.items() if chosen and chosen(layer)]
    yield from (Change(layer, module, name, unread=what) for layer, name in found)
    if not found:
        yield Change(
            kind, module, None, unread=f"{kind} targets no layer that can be told: it may have no merge at all"
        )


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


def _report(
    loras: list[LoraAdapter], found: list[Module], untouched: Untouched, loader: str, command: str,
    options: VerifyOptions,
) -> MergeReport:  # fmt: skip
    law = _law(found)
    frame = {"loader": loader, "format": loras[0].format, "reproduce": command}
    modules = tuple(module_verdict(module, law.code, frame) for module in found)
    kinds = {module.variant for lora in loras for module in lora.modules.values()}
    overall = overall_verdict(found, modules, untouched, law, frame, kinds=kinds, allowed=options.allow_unjudged)
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


def _command(bases: Sequence[Path], merged: Path | str, loras: Sequence[Path], options: VerifyOptions) -> str:
    parts = ["lora-harness", "verify", *(part for base in bases for part in ("--base", str(base)))]
    parts += ["--merged", str(merged), *(part for lora in loras for part in ("--lora", str(lora)))]
    strengths = options.strength if isinstance(options.strength, tuple) else (options.strength,)
    parts += [part for one in strengths for part in ("--strength", f"{one:g}")] if set(strengths) != {1.0} else []
    parts += ["--lora-alpha", f"{options.lora_alpha:g}"] if options.lora_alpha is not None else []
    parts += [part for kind in options.allow_unjudged for part in ("--allow-unjudged", kind)]
    return shlex.join([*parts, "--full"] if options.full else parts)
