"""What a tool does with a file: the answer, the strength that undoes a law in it, and both in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.doctor.traits import Traits
from harness.files import LoraModule
from harness.law.findings import Finding
from harness.law.known import Tool, wanted_scale
from harness.law.law import Law
from harness.law.reads import measured_on

Effect = Literal["law", "factor", "drops", "nothing", "raises", "hangs", "wrong", "cannot", "unknown"]
Sure = Literal["measured", "by name", "read", "unknown"]
EVERY = "every module"
BY_NAME = "every module that its model has under this name"
_PLAIN = ("lora", "conv")
_BESIDE = {
    "peft": "adapter_config.json beside it, where lora_alpha stands",
    "mlx": "adapter_config.json beside it, where lora_parameters say rank and scale",
}


@dataclass(frozen=True)
class Answer:
    """What a tool does with a file.

    `effect` is `law` when every module gets its trained scale times a number that one strength undoes; `strength` is
    then the number for the tool's field, None when no single value is right or the file does not say enough. `gain`
    is how many times too strong the modules are at strength 1, smallest and largest, as far as it is known. `told`
    continues "<tool> …", or "applies <modules> …" where there are `modules`. `sure`: `measured` on the tool's own code
    and this architecture; `by name`: its law is measured, and it takes modules by the model's own names; `read` in its
    code; `unknown`. `instead` is the format of the repair that mends it, `do` what else does. `day`: when it was
    measured, where that is not the day of reads.json.
    """

    tool: Tool
    effect: Effect
    told: str
    sure: Sure
    strength: float | None = None
    gain: tuple[float, float] | None = None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    instead: str | None = None
    do: str = ""
    day: str = ""
    modules: str = ""

    @property
    def says(self) -> str:
        """The answer in words, behind the name of the tool."""
        return f"applies {self.modules} {self.told}" if self.modules else self.told


@dataclass(frozen=True)
class Question:
    """A question about a file: the release of the tool (None: the one known), and what its training's alpha was.

    `lora_alpha` counts for modules without alpha; `as_rank` says that their alpha was their rank, `supposed` that
    nothing in the file proves it. `base` is the model.
    """

    version: str | None = None
    lora_alpha: float | None = None
    as_rank: bool = False
    supposed: bool = False
    base: Path | None = None


def loaded_without_alpha(tool: Tool, traits: Traits) -> Answer | None:
    """Return the answer for a file without alpha in a tool that cannot do without."""
    if traits.adapter.alpha_by_release or tool.without_alpha != "raises":
        return None
    if not any(module.rank and module.alpha is None for module in traits.modules):
        return None
    what = _BESIDE.get(next(iter(tool.formats)), "alpha")
    do = f"put {what}" if what != "alpha" else ""
    return Answer(tool, "raises", f"cannot load a file without {what}", "read", do=do)


def by_scales(tool: Tool, law: Law, gains: Sequence[tuple[float, LoraModule]], asked: Question) -> Answer:
    """Return the strength at which `law` gives every module its trained scale; `gains` are theirs at strength 1."""
    modules = [module for _, module in gains]
    wanted = [_wanted(module, asked) for module in modules]
    known = [scale for scale in wanted if scale is not None]
    if len(known) < len(wanted):
        return Answer(tool, "law", _what_is_missing(tool, gains), "unknown")
    found = [gain for gain, _ in gains]
    ratios = [gain / scale for gain, scale in zip(found, known, strict=True) if scale]
    span = (min(ratios), max(ratios)) if ratios else None
    strength = law.strength_for(found, known)
    plain = all(module.variant in _PLAIN for module in modules)
    if strength is None or (strength != 1 and not plain):
        what = "no single strength is right" if strength is None else "its strength is not linear in such modules"
        return Answer(tool, "factor", f"{_strong(span)}: {what}", "unknown", gain=span, modules=EVERY)
    without = asked.supposed and any(module.rank and module.alpha is None for module in modules)
    told = f"{_strong(span)}, if its alpha was its rank" if without else _strong(span)
    return Answer(tool, "law", told, "unknown", strength, span, modules=EVERY)


def _wanted(module: LoraModule, asked: Question) -> float | None:
    if asked.as_rank and module.rank and module.alpha is None:
        return 1.0
    if module.rank and module.alpha == 0 and asked.lora_alpha is None:
        return None  # nobody trains at scale 0
    return wanted_scale(module, asked.lora_alpha)


def _what_is_missing(tool: Tool, gains: Sequence[tuple[float, LoraModule]]) -> str:
    modules = [module for _, module in gains]
    if tool.in_config:
        scales = sorted({f"{gain:.4g}" for gain, _ in gains}, key=float)
        return f"applies modules at scale {' to '.join(scales)}; what the training meant, the file does not say"
    if any(module.rank and module.alpha == 0 for module in modules):
        read = "the rank, scale 1" if tool.alpha_zero == "rank" else f"scale {tool.alpha_zero}"
        return f"takes alpha 0 as {read}; what the training meant, the file does not say"
    ranks = {module.rank for module in modules if module.rank and module.alpha is None}
    over = f"{ranks.pop()}" if len(ranks) == 1 else "rank"
    what = "applies modules without alpha at scale 1; which alpha was trained with, the file does not say"
    return f"{what}: lora_alpha / {over}, once it is known"


def _strong(span: tuple[float, float] | None) -> str:
    if span is None or all(math.isclose(end, 1, rel_tol=1e-6) for end in span):
        return "as trained"
    low, high = span
    shown = f"{low:.4g}" if abs(high - low) < 1e-6 * abs(high) else f"{low:.4g} to {high:.4g}"
    return f"{shown} times as strong as trained"


def sure_of(tool: Tool) -> Sure:
    """Tell whether what is said of a tool was measured on its code, or read in it."""
    return "measured" if tool.known == "measured" else "read"


def how_sure(given: Answer) -> str:
    """Return how the answer is known, with the pages of the findings behind it."""
    tool = given.tool
    day = given.day or measured_on()
    if given.effect == "cannot":
        return f"as the code of {tool.release} says"
    ways = {
        "measured": f"measured on {tool.release}, on this architecture and spelling of keys ({day})",
        "by name": f"the law is measured on {tool.release}; it takes these modules if its model has their names"
        if given.effect in ("law", "factor")
        else f"not measured on these layers: as its rule for names in {tool.release} says",
        "read": f"not measured: {tool.provenance}",
        "unknown": "not measured",
    }
    pages = [
        finding.link for finding in given.findings if finding.page and (finding.blocks or finding.effect == "rounds")
    ]
    return "; ".join([ways[given.sure], *given.notes, *pages])
