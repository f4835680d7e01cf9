"""What the energies of a LoRA advise: it is fine, subtle, too strong or broken, and what to do about it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.inspect.fit import towers_note
from harness.doctor.inspect.spectrum import Pair, Spectrum, spectra, spectrum
from harness.files.architectures import Slot
from harness.text import count, printable
from harness.verdict.blocks import family_of, norm_of
from harness.verdict.file_record import Advice, FileRecord, Hazard, ModuleEnergy

if TYPE_CHECKING:
    from harness.doctor.match import Placement
    from harness.doctor.on_base import Held
    from harness.files import LoraAdapter, LoraModule

# ||ΔW|| / ||W|| over all adapted layers. On the tiny Qwen-Image pipeline of the image tests 0.016 to 0.08 is a clear
# style with intact objects, twice that damages them and four times (0.12 to 0.32) destroys them. A guide, not a law.
SUBTLE_BELOW = 0.005
STRONG_ABOVE = 0.25
_FULL_RANK = 0.8  # effective rank / rank above which the rank is used up
_FAMILIES_SHOWN = 8
_QUANTISED_NAME = re.compile(r"(bnb-)?4-?bit|nf4|int4|int8|8-?bit|gptq|awq|fp8", re.I)


def advise(
    adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy], base: Checkpoint | None, placed: Placement | None = None
) -> Advice | None:
    """Return the outlook of a LoRA, or None when nothing can be said: no pair, or no base and nothing broken."""
    if broken := _broken(adapter, energies):
        return broken
    matched = readable(base, placed) if base and placed else {}
    pairs = {name: energy for name, energy in energies.items() if name in matched}
    if base is None or placed is None or not pairs:
        return None
    whole = norm_of(base_norm(base, placed.slots[name]) for name in pairs)
    share = norm_of(energy.norm for energy in pairs.values()) / whole if whole else math.inf
    said = f"||ΔW|| / ||W|| is {share:.2g} over {count(len(pairs), 'module')}"
    unknown = any(m.alpha is None and m.rank and not m.unscaled for m in adapter.modules.values())
    said += ", measured at scale 1, since alpha is unknown" if unknown else ""
    at = "at scale 1" if unknown else "at the trained strength"
    if share < SUBTLE_BELOW:
        reason = f"{said}, below {SUBTLE_BELOW:g}: {at} it changes little"
        return Advice(outlook="subtle", reason=reason, advice=_stronger(adapter, energies, untargeted(base, placed)))
    if share > STRONG_ABOVE:
        reason = f"{said}, above {STRONG_ABOVE:g}: expect artifacts {at}"
        return Advice(outlook="too strong", reason=reason, advice=_weaker(adapter))
    return Advice(outlook="fine", reason=said)


def _broken(adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy]) -> Advice | None:
    fatal = [problem for problem in adapter.problems if problem.fatal]
    if fatal:
        reason, advice = fatal[0].text(), "save the file again from the training run"
    elif not_finite := _not_finite(energies):
        reason, advice = not_finite, "go back to a checkpoint from before the loss diverged"
    elif energies and all(adapter.modules[name].trained_scale == 0 for name in energies):
        reason = "alpha is 0: the scale is 0, whatever B @ A is"
        advice = "look up lora_alpha in the training configuration and give it with --lora-alpha"
    elif energies and all(energy.norm == 0 for energy in energies.values()):
        reason = "B @ A is zero in every module: this LoRA changes nothing"
        advice = "check that training took steps and that the trained weights, not the initial ones, were saved"
    else:
        return None
    return Advice(outlook="broken", reason=reason, advice=(advice,))


def _not_finite(energies: Mapping[str, ModuleEnergy]) -> str | None:
    bad = [name for name, energy in energies.items() if not energy.finite]
    return f"NaN or infinite weights in {count(len(bad), 'module')} ({printable(bad[0], 80)})" if bad else None


def _stronger(adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy], missing: list[str]) -> tuple[str, ...]:
    """Return what makes a subtle LoRA stronger; alpha and strength are right already and are not the way."""
    advice = ["train longer, or raise the learning rate", _about_rank(adapter, energies)]
    if missing:
        names = ", ".join(missing[:_FAMILIES_SHOWN]) + (", …" if len(missing) > _FAMILIES_SHOWN else "")
        advice.append(f"add target modules; not targeted in this base: {names}")
    advice.append("the scale is the trained one: a larger strength would only amplify an under-trained update")
    return tuple(advice)


def _weaker(adapter: LoraAdapter) -> tuple[str, ...]:
    sure = "train shorter or with a lower learning rate, or use a lower strength until then"
    if adapter.alpha_source == "none" and not any(module.unscaled for module in adapter.modules.values()):
        return ("the file has no alpha, so this assumes scale 1: training may have used lora_alpha / rank", sure)
    return ("check that this is the base it was trained on", sure)


def _about_rank(adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy]) -> str:
    live = [name for name, energy in energies.items() if energy.norm > 0]
    used = sum(energies[name].effective_rank for name in live) / len(live)
    rank = sum(adapter.modules[name].rank for name in live) / len(live)
    if used > _FULL_RANK * rank:
        return f"raise the rank: {used:.3g} of {rank:.3g} are in use"
    return f"a higher rank matters less: {used:.3g} of {rank:.3g} are in use"


def untargeted(base: Checkpoint, placed: Placement) -> list[str]:
    """Return the kinds of layers of the base that the LoRA leaves alone, the largest first."""
    tensors = (base.layers[slot.layer] for slots in placed.slots.values() for slot in slots)
    targeted = {family_of(tensor.removesuffix(".weight")) for tensor in tensors}
    sizes: Counter[str] = Counter()
    for tensor in base.layers.values():
        info = base.info(tensor)
        if len(info.shape) > 1 and min(info.shape[:2]) > 1:
            sizes[family_of(tensor.removesuffix(".weight"))] += info.elements
    return [kind for kind, _ in sizes.most_common() if kind not in targeted]


def with_energy(record: FileRecord, adapter: LoraAdapter, held: Held | None = None) -> FileRecord:
    """Return `record` with the energy of every low-rank pair, hazard LH707, and what the energies advise.

    `held` is the file held against its base.
    """
    weights, placed = (held.base, held.placed) if held else (None, None)
    found = energies(adapter, weights, placed)
    hazards = [*record.hazards, *(held.hazards if held else ())]
    if (what := _not_finite(found)) and "LH707" not in record.codes:
        hazards.append(Hazard(code="LH707", what=what))
    known = {name: energy for name, energy in found.items() if energy.finite}
    relative = {name: energy.relative for name, energy in known.items() if energy.relative is not None}
    notes = [*_of_base(adapter, weights, placed), *towers_note(adapter, weights)] if weights and placed else []
    return record.model_copy(
        update={
            "fit": held.fit if held else None,
            "notes": (*record.notes, *notes),
            "hazards": tuple(sorted(hazards, key=lambda hazard: hazard.code)),
            "energy": relative if weights else {name: energy.norm for name, energy in known.items()},
            "energies": found,
            "advice": advise(adapter, found, weights, placed),
        }
    )


def _of_base(adapter: LoraAdapter, base: Checkpoint, placed: Placement) -> Iterator[str]:
    """Yield what quantisation of the base means for the shares: real weights, or not judged."""
    weights = dict.fromkeys(base.layers[slot.layer] for some in placed.slots.values() for slot in some)
    unread = Counter(why for name in weights if (why := base.unreadable(name)))
    for why, times in unread.items():
        yield f"{count(times, 'layer')} of the base not judged: {why}"
    kinds = Counter(how for name in weights if not base.unreadable(name) and (how := base.quantised(name)))
    for how, times in kinds.items():
        yield f"{count(times, 'layer')} of the base stored as {how}: the shares are of the dequantised weights"
    said = str(adapter.config.get("base_model_name_or_path") or "")
    if (trained := _QUANTISED_NAME.search(said)) and weights and not (kinds or unread):
        yield (
            f"trained on {printable(said, 80)}, a base in {trained[0]}, and these are full weights: "
            "merged into them it corrects roundings that they do not have"
        )


def readable(base: Checkpoint, placed: Placement) -> dict[str, tuple[Slot, ...]]:
    """Return the slots of every module whose layers' real weights can be had."""
    return {
        module: slots
        for module, slots in placed.slots.items()
        if all(base.unreadable(base.layers[slot.layer]) is None for slot in slots)
    }


def energies(
    adapter: LoraAdapter, base: Checkpoint | None = None, placed: Placement | None = None
) -> dict[str, ModuleEnergy]:
    """Return the energy of every module that is a pair A, B; of DoRA and biases only the low-rank part counts."""
    placed = base.place(adapter) if base and placed is None else placed
    slots = readable(base, placed) if base and placed else {}
    modules = {name: module for name, module in adapter.modules.items() if _is_measured(module)}
    found = spectra([partial(_pairs, adapter, name) for name in modules])
    named = {name: _energy(module, some) for (name, module), some in zip(modules.items(), found, strict=True)}
    if base is None:
        return named
    return {name: _relative(energy, base, slots.get(name)) for name, energy in named.items()}


def _is_measured(module: LoraModule) -> bool:
    pair = "A" in module.keys and "B" in module.keys and "mid" not in module.keys
    return pair and math.isfinite(module.trained_scale)


def _pairs(adapter: LoraAdapter, name: str) -> Sequence[Pair]:
    a, b = adapter.tensors(name)
    return list(zip(a, b, strict=True)) if adapter.modules[name].variant == "experts" else [(a, b)]


def _relative(energy: ModuleEnergy, base: Checkpoint, slots: Iterable[Slot] | None) -> ModuleEnergy:
    if slots is None or not energy.finite:
        return energy
    norm = base_norm(base, slots)
    return energy.model_copy(update={"relative": energy.norm / norm if norm else None})


def base_norm(base: Checkpoint, slots: Iterable[Slot]) -> float:
    """Return ||W|| over the rows of the base that a module changes."""
    return norm_of(_slot_norm(base, base.layers[slot.layer], slot) for slot in slots)


def _slot_norm(base: Checkpoint, tensor: str, slot: Slot) -> float:
    if slot.rows is None:
        return base.norm(tensor)
    weight = base.matrix_rows(tensor, *slot.rows)
    weight = weight if weight.dtype.itemsize > 1 else weight.float()
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def _energy(module: LoraModule, found: Sequence[Spectrum]) -> ModuleEnergy:
    """Return the energy of one pair, or of all experts of one parameter together."""
    energies = [_scaled(spectrum, module.trained_scale) for spectrum in found]
    if len(energies) == 1 or not all(energy.finite for energy in energies):
        return next((energy for energy in energies if not energy.finite), energies[0])
    strongest = max(energies, key=lambda energy: energy.spectral)
    used = sum(energy.effective_rank for energy in energies) / len(energies)
    return strongest.model_copy(update={"norm": norm_of(one.norm for one in energies), "effective_rank": used})


def pair_energy(a: Tensor, b: Tensor, scale: float) -> ModuleEnergy:
    """Return the energy of scale * B @ A for a: [r, in, ...] and b: [out, r, ...]."""
    return _scaled(spectrum(a, b), scale)


def _scaled(found: Spectrum, scale: float) -> ModuleEnergy:
    norm = found.norm * abs(scale)
    if not math.isfinite(norm):
        return ModuleEnergy(norm=0.0, finite=False)
    leading = tuple(value * abs(scale) for value in found.leading)
    used = found.effective_rank if scale else 0.0
    return ModuleEnergy(norm=norm, spectral=leading[0], singular=leading, effective_rank=used)
