"""What becomes of a PEFT folder in a tool that reads it by way of a converter of its own, which drops a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from harness.doctor.answer import Answer, Question, by_scales, sure_of
from harness.doctor.traits import Traits
from harness.files import LoraModule
from harness.law.findings import Finding
from harness.law.known import Tool
from harness.text import printable

_MERGE = "merge it into its base with PEFT (`merge_and_unload`), and convert the merged model"


def converted(tool: Tool, traits: Traits, asked: Question, hit: Sequence[Finding]) -> Answer:
    """Return what `tool` does with the folder as its converter leaves it; `hit` are the faults that it meets there.

    A strength is given where one is right for what the converter writes, which the tool then multiplies by its law.
    """
    what = tool.not_reading(traits.adapter.format)
    if stop := next((key for key in traits.adapter.file.keys if not _takes(tool, key)), ""):
        what = f"{what}; its converter stops at {printable(stop, 80)}, which is none of the pairs"
        return Answer(tool, "cannot", what, sure_of(tool), do=_MERGE)
    plain = Answer(tool, "cannot", what, sure_of(tool), do=tool.convert)
    if not _is_understood(tool, traits):
        return plain
    law = tool.law
    given = by_scales(tool, law.law, [(law.at_one(_as_written(tool, traits, m)), m) for m in traits.modules], asked)
    faults = tuple(finding for finding in hit if finding.blocks)
    what = f"{what}; {faults[0].says}, and {given.says}" if faults else what
    number = given.strength if given.effect == "law" else None
    do = "" if number is None and faults else tool.convert
    return Answer(tool, "cannot", what, plain.sure, number, given.gain, findings=faults, do=do)


def _takes(tool: Tool, key: str) -> bool:
    return any(fnmatchcase(key, glob) for glob in tool.converts)


def _is_understood(tool: Tool, traits: Traits) -> bool:
    """Tell whether the converter's output is known: plain modules of a language model, by a configuration's alpha."""
    takes = all(tool.variants.get(variant) == "ok" for variant in traits.variants)
    return takes and traits.is_language and not traits.wrapped and _alpha_of_all(traits) is not None


def _as_written(tool: Tool, traits: Traits, module: LoraModule) -> LoraModule:
    """Return a module as the converter writes it."""
    kept = module.changed(rslora=False) if "use_rslora" in tool.drops else module
    return kept.changed(alpha=_alpha_of_all(traits)) if "alpha_pattern" in tool.drops else kept


def _alpha_of_all(traits: Traits) -> float | None:
    found = traits.adapter.config.get("lora_alpha")
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
