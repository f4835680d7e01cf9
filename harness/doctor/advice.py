"""What the energies of a LoRA advise: it is fine, subtle, too strong or broken, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.doctor.base import BaseWeights, family, norm_of
from harness.doctor.record import Advice, ModuleEnergy
from harness.files.text import count, printable

if TYPE_CHECKING:
    from harness.files import LoraAdapter

# ||ΔW|| / ||W|| over all adapted layers. On the tiny Qwen-Image pipeline of the image tests 0.016 to 0.08 is a clear
# style with intact objects, twice that damages them and four times (0.12 to 0.32) destroys them. A guide, not a law.
SUBTLE_BELOW = 0.005
STRONG_ABOVE = 0.25
_FULL_RANK = 0.8  # effective rank / rank above which the rank is used up
_FAMILIES_SHOWN = 8


def advise(adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy], base: BaseWeights | None) -> Advice | None:
    """Return the outlook of a LoRA, or None when nothing can be said: no pair, or no base and nothing broken."""
    if broken := _broken(adapter, energies):
        return broken
    matched = base.match(adapter) if base else {}
    pairs = {name: energy for name, energy in energies.items() if name in matched}
    if base is None or not pairs:
        return None
    share = norm_of(energy.norm for energy in pairs.values()) / norm_of(base.norm(matched[name]) for name in pairs)
    said = f"||ΔW|| / ||W|| is {share:.2g} over {count(len(pairs), 'module')}"
    if share < SUBTLE_BELOW:
        reason = f"{said}, below {SUBTLE_BELOW:g}: loaded as trained, it changes little"
        return Advice(outlook="subtle", reason=reason, advice=_stronger(adapter, energies, base))
    if share > STRONG_ABOVE:
        reason = f"{said}, above {STRONG_ABOVE:g}: expect artifacts at the trained strength"
        return Advice(outlook="too strong", reason=reason, advice=_weaker(adapter))
    return Advice(outlook="fine", reason=said)


def _broken(adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy]) -> Advice | None:
    fatal = [problem for problem in adapter.problems if problem.fatal]
    if fatal:
        return Advice(outlook="broken", reason=fatal[0].text(), advice=("save the file again from the training run",))
    bad = [name for name, energy in energies.items() if not energy.finite]
    if bad:
        reason = f"NaN or infinite weights in {count(len(bad), 'module')} ({printable(bad[0], 80)})"
        return Advice(
            outlook="broken", reason=reason, advice=("go back to a checkpoint from before the loss diverged",)
        )
    if energies and all(energy.norm == 0 for energy in energies.values()):
        reason = "B @ A is zero in every module: this LoRA changes nothing"
        advice = ("check that training took steps and that the trained weights, not the initial ones, were saved",)
        return Advice(outlook="broken", reason=reason, advice=advice)
    return None


def _stronger(adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy], base: BaseWeights) -> tuple[str, ...]:
    """Return what makes a subtle LoRA stronger; alpha and strength are right already and are not the way."""
    advice = ["train longer, or raise the learning rate", _about_rank(adapter, energies)]
    if missing := untargeted(adapter, base):
        names = ", ".join(missing[:_FAMILIES_SHOWN]) + (", …" if len(missing) > _FAMILIES_SHOWN else "")
        advice.append(f"add target modules; not targeted in this base: {names}")
    advice.append("the scale is the trained one: a larger strength would only amplify an under-trained update")
    return tuple(advice)


def _weaker(adapter: LoraAdapter) -> tuple[str, ...]:
    sure = "train shorter or with a lower learning rate, or use a lower strength until then"
    if adapter.alpha_source == "none":
        return ("the file has no alpha, so this assumes scale 1: training may have used lora_alpha / rank", sure)
    return ("check that this is the base it was trained on", sure)


def _about_rank(adapter: LoraAdapter, energies: Mapping[str, ModuleEnergy]) -> str:
    live = [name for name, energy in energies.items() if energy.norm > 0]
    used = sum(energies[name].effective_rank for name in live) / len(live)
    rank = sum(adapter.modules[name].rank for name in live) / len(live)
    if used > _FULL_RANK * rank:
        return f"raise the rank: {used:.3g} of {rank:.3g} are in use"
    return f"a higher rank matters less: {used:.3g} of {rank:.3g} are in use"


def untargeted(adapter: LoraAdapter, base: BaseWeights) -> list[str]:
    """Return the kinds of layers of the base that the LoRA leaves alone, the largest first."""
    targeted = {family(name) for name in base.match(adapter).values()}
    sizes = base.families()
    return sorted((kind for kind in sizes if kind not in targeted), key=lambda kind: -sizes[kind])
