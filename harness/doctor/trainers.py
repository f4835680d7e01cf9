"""Who wrote a file, and by which rule its trainer chose an alpha that the file does not say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from harness.doctor.answer import Question
from harness.doctor.traits import Traits
from harness.files import LoraAdapter, with_alpha

_SEEN_CHARACTERS = 200
_MUSUBI = ("wan", "framepack", "qwen_image", "zimage", "kandinsky", "flux_2", "hv_1_5", "krea2", "ideogram4", "hidream")
_TRAINERS = (
    ("ai-toolkit", r"ai-?toolkit"), ("OneTrainer", r"onetrainer|^ot_"), ("SimpleTuner", r"simpletuner"),
    ("musubi-tuner", rf"musubi|^hunyuan_video$|networks\.lora_({'|'.join(_MUSUBI)})"),
    ("DiffSynth-Studio", r"diffsynth"), ("LyCORIS", r"lycoris"), ("kohya sd-scripts", r"sd-scripts|^ss_"),
)  # fmt: skip
_SIGNS = tuple((name, re.compile(pattern, re.IGNORECASE).search) for name, pattern in _TRAINERS)


def trainer_of(metadata: Mapping[str, str]) -> str | None:
    """Name the tool that wrote the metadata, as far as it can be told."""
    texts = [*metadata, *(value[:_SEEN_CHARACTERS] for value in metadata.values())]
    return next((name for name, is_of in _SIGNS if any(map(is_of, texts))), None)


def rule_of(traits: Traits, lora_alpha: float | None = None) -> str | None:
    """Return the rule by which alpha was chosen, None where alpha is known or no rule is."""
    return _rule(traits) if _is_without(traits, lora_alpha) else None


def with_rule(traits: Traits, asked: Question) -> Question:
    """Return what is asked of every tool, the trainer's rule included."""
    rule = rule_of(traits, asked.lora_alpha)
    return replace(asked, as_rank=rule is not None, supposed=rule is not None and rule.startswith("if "))


def unused_alpha(adapter: LoraAdapter, lora_alpha: float | None) -> str:
    """Say that an alpha which was given is not needed; empty where none was, or it is."""
    if lora_alpha is None or with_alpha(adapter, lora_alpha) is not adapter:
        return ""
    has_own = any(module.alpha for module in adapter.modules.values())
    return f"--lora-alpha {lora_alpha:g} is not used: the file has its own alpha" if has_own else ""


def about_alpha(traits: Traits, lora_alpha: float | None = None) -> Iterator[str]:
    """Say what a file without alpha may mean, in numbers; of one with alpha, that none was needed."""
    if unused := unused_alpha(traits.adapter, lora_alpha):
        yield unused
    if not _is_without(traits, lora_alpha):
        return
    if two := traits.adapter.alpha_by_release:
        once = f"{two[0] * two[1]:g} if mlx-vlm up to 0.4.4 trained it, {two[0]:g} if a later one did"
        yield f"as others count, {once}: --lora-alpha N"
        return
    ranks = sorted({module.rank for module in traits.modules if module.rank})
    rank = f"{ranks[0]}" if len(ranks) == 1 else "r"
    if rule := _rule(traits):
        yield f"none in the file; {rule}, so 1 is as trained; if yours was N, pass N / {rank}"
        return
    worst = f"passing {rank} would be {rank}x too strong if it was {rank}" if rank != "r" else "never pass the rank"
    worst = "" if rank == "1" else f"; {worst}"
    yield f"none in the file: if lora_alpha was {rank} pass 1, if it was N pass N / {rank}{worst}"


def _is_without(traits: Traits, lora_alpha: float | None) -> bool:
    return "none" in traits.alphas and lora_alpha is None and not any(p.fatal for p in traits.adapter.problems)


def _rule(traits: Traits) -> str | None:
    adapter, trainer = traits.adapter, trainer_of(traits.adapter.metadata)
    schemes = {scheme for group in traits.groups for scheme in group.schemes}
    if trainer == "ai-toolkit" or adapter.dialect == "ai-toolkit":
        return "ai-toolkit trains with alpha = rank"
    if adapter.format == "comfyui" and all(module.unscaled for module in adapter.modules.values() if module.rank):
        return "the whole differences beside say that it was extracted from the difference of two models: scale 1"
    if adapter.format in ("xlabs", "attn-procs", "bfl-control"):
        return f"{adapter.format} files have no place for alpha: they are trained at scale 1"
    if trainer == "DiffSynth-Studio" or schemes == {"bare.default.none"}:
        return "DiffSynth's trainer takes lora_alpha = rank unless it is told otherwise"
    places = [place for group in traits.groups for place in group.places]
    known = any(names == "own" for _, names in places)  # diffusers has no layers with the authors' names
    if known and schemes and schemes <= {"transformer.lora.down.none", "transformer.linear.none", "transformer.A.none"}:
        unet = any("unet" in module.component for module in adapter.modules.values())
        old = " (those of 0.24, of December 2023, with 8)" if unet else ""
        return f"if one of diffusers' scripts wrote it, it trained with alpha = rank{old}"
    return None
