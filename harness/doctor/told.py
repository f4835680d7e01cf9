"""A diagnosis as it is told: line by line for people, and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from harness.doctor.answer import BY_NAME, EVERY, Answer, how_sure
from harness.doctor.answers import answers, why_not
from harness.doctor.causes import causes
from harness.doctor.diagnose import CANNOT, GRAVE, FileDiagnosis
from harness.doctor.mending import command, repaired_to, wants_a_base
from harness.doctor.on_base import on_base
from harness.doctor.trainers import about_alpha
from harness.doctor.what_it_is import model_of, what_it_is
from harness.law.scale import word_of
from harness.text import count, printable
from harness.verdict.file_record import BaseFit


def lines(found: FileDiagnosis) -> Iterator[tuple[str, str]]:
    """Yield the answer, line by line: a label and a sentence."""
    yield "file", what_it_is(found.traits, found.trainer)
    for problem in found.fatal[:1]:
        yield "broken", f"{problem.code} {problem.text()}"
    for hazard in found.grave:
        yield "broken", f"{hazard.code} {hazard.what}"
    yield from _of_base(found)
    if found.is_for_another:
        yield "pass", "no number: on this base it does nothing right"
        yield "do", f"load it into the model that it was trained on: {model_of(found.traits)}"
    elif found.grave:
        yield "pass", "no number makes it right"
        yield "do", GRAVE[found.grave[0].code]
    elif found.tool:
        yield from _of_tool(found, found.answers[found.tool.name])
    else:
        yield from _of_all(found)
    yield from (("alpha", line) for line in about_alpha(found.traits, found.asked.lora_alpha))
    if found.saw:
        for number, cause in enumerate(causes(found), 1):
            yield f"cause {number}", cause.what + (f" ({cause.evidence})" if cause.evidence else "")
            yield "  test", cause.test


def _of_base(found: FileDiagnosis) -> Iterator[tuple[str, str]]:
    if found.fit:
        yield "base", placed(found.fit)
    for hazard in found.misfits:
        yield "base", f"{hazard.code} {hazard.what}"


def placed(fit: BaseFit) -> str:
    """Return how much of a file applies to a base, in one clause."""
    return f"applies to {fit.applied} of {count(fit.modules, 'module')} in {printable(fit.base, 80)}"


def _of_tool(found: FileDiagnosis, given: Answer) -> Iterator[tuple[str, str]]:
    tool = given.tool
    title = re.sub(r" [<>]=.*", "", tool.title)
    yield "tool", f"{title} {found.asked.version or tool.release}: {given.says}"
    if given.strength is not None and found.traits.adapter.is_unscaled:
        yield "pass", f"nothing to pass: {found.traits.adapter.kind} has no strength"
    elif given.strength is not None:
        steps = _steps(found, given.strength) if tool.passes else ""
        yield "pass", tool.passing(given.strength, found.traits.components) + steps
    else:
        yield (
            "pass",
            "no number makes this right there" if given.effect in CANNOT else "not known from this file alone",
        )
    yield "do", _what_to_do(found, given)
    yield "sure", how_sure(given)


def _steps(found: FileDiagnosis, right: float) -> str:
    """Return what other numbers would do with this file, which is what people try: 4 times, and the rank or alpha."""
    ranks = {module.rank for module in found.traits.modules if module.rank}
    tried = sorted({4 * right, *({float(max(ranks))} if ranks and right else set())} - {right})
    shown = "; ".join(f"{number:.4g} {word_of(number / right)}" for number in tried if right)
    return f"  ({right:.4g} as trained; {shown})" if shown else ""


def _what_to_do(found: FileDiagnosis, given: Answer) -> str:
    if broken := next((GRAVE[hazard.code] for hazard in found.grave), ""):
        return broken
    if given.instead:
        repair = command(found.path, found.traits, found.question, given.instead)
        return repair if given.instead in given.tool.formats else f"{repair}, then {given.tool.convert}"
    if given.do:
        return given.do
    if given.effect == "law" and given.strength is None:
        return "give the alpha of the training: --lora-alpha N"
    if given.effect in CANNOT and (to := _once_alpha_is_known(found, given)):
        return f"give the alpha of the training, --lora-alpha N: `repair --to {to}` then writes a file that it reads"
    if given.effect in CANNOT:
        if found.misfits:
            return f"load it into the model that it was trained on: {model_of(found.traits)}"
        base = wants_a_base(given.tool, found.traits, found.question)
        asks = "; or ask again with --base MODEL, whose layers a repair would need" if base else ""
        return f"use a tool that reads it: {able(found) or 'none is known'}{asks}"
    if given.effect == "unknown":
        log = f"look for {given.tool.log}: each such line is a part that it left out" if given.tool.log else ""
        again = "" if found.held else ", or give --base CHECKPOINT to see what applies"
        return f"{log or 'measure its loader: `lora-harness check LOADER`'}{again}"
    return _what_to_check(found, given)


def _what_to_check(found: FileDiagnosis, given: Answer) -> str:
    if found.misfits:
        return "check that this is the base it was trained on"
    if given.modules == BY_NAME:
        left = f"there is no {given.tool.log}" if given.tool.log else "it changes what comes out at all"
        return f"see that {left}" + ("" if found.held else ", or ask again with --base")
    return "if that is what you passed, try the causes below, from the first on" if found.saw else "nothing else"


def _once_alpha_is_known(found: FileDiagnosis, given: Answer) -> str | None:
    """Return the format of the repair that only waits for an alpha."""
    if "none" not in found.traits.alphas or found.question.lora_alpha is not None or found.question.as_rank:
        return None
    return repaired_to(given.tool, found.traits, replace(found.question, lora_alpha=1.0))


def able(found: FileDiagnosis) -> str:
    """Return the tools that apply the file as trained, with their numbers."""
    every = on_base(answers(found.traits, found.question), found.held, found.traits)
    return ", ".join(
        f"{a.tool.name} {a.strength:g}" if a.tool.passes else a.tool.name
        for a in every.values()
        if a.strength is not None and a.tool.release
    )


def _of_all(found: FileDiagnosis) -> Iterator[tuple[str, str]]:
    """Group the tools by what they do, the ones that need no thought first."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for each in found.answers.values():
        if each.tool.release:
            groups.setdefault(_kind(found, each), []).append(each)
    for (label, says), some in sorted(_gathered(groups).items(), key=lambda item: _RANKED.index(item[0][0])):
        names = ", ".join(each.tool.title for each in some)
        yield label, f"{names}: {says}"
    if not groups:
        yield "unknown", f"no tool is known to read {found.traits.adapter.format} files"


_RANKED = ("pass", "wrong", "ask", "unknown", "cannot")
_TOGETHER = {
    "unknown": "not measured on this model, these keys or these modules; --tool NAME says more",
    "cannot": "no model with these layers",
}


def _gathered(groups: Mapping[tuple[str, str], list[Answer]]) -> dict[tuple[str, str], list[Answer]]:
    """Return the groups with one for all that nothing is known of, and one for all that have no such model."""
    found: dict[tuple[str, str], list[Answer]] = {}
    for label, says in groups:
        several = sum(other == label for other, _ in groups) > 1
        found.setdefault((label, _TOGETHER[label] if several and label in _TOGETHER else says), []).extend(
            groups[label, says]
        )
    return found


def _kind(found: FileDiagnosis, given: Answer) -> tuple[str, str]:
    if given.strength is not None:
        root = any(module.rslora for module in found.traits.modules)
        standard = f"standard, {'alpha / sqrt(rank), as rsLoRA' if root else 'alpha / rank'}"
        how = [standard if given.gain in (None, (1.0, 1.0)) else given.says]
        usual = ("", EVERY, BY_NAME) if found.traits.is_language else ("", EVERY)
        how += [given.modules.rstrip(",")] if given.modules not in usual and how == [standard] else []
        how += [] if given.sure in ("measured", "by name") else ["read in its code"]
        return "pass", f"{given.strength:.6g}  ({'; '.join(how)})"
    if given.effect in ("law", "cannot"):
        return "ask" if given.effect == "law" else "cannot", given.says
    return (
        ("unknown", given.says)
        if given.effect == "unknown"
        else ("wrong", why_not(given, found.traits, found.question))
    )


def as_data(found: FileDiagnosis) -> dict[str, Any]:
    """Return the diagnosis as JSON."""
    return {
        "kind": "diagnosis",
        "path": str(found.path).encode("utf-8", "backslashreplace").decode(),
        "file": what_it_is(found.traits, found.trainer),
        "model": model_of(found.traits),
        "trainer": found.trainer,
        "rule": found.rule,
        "base": placed(found.fit) if found.fit else None,
        "base_hazards": [f"{each.code} {each.what}" for each in found.misfits],
        "answers": [_answer_data(found, each) for each in found.answers.values()],
        "causes": [vars(cause) for cause in causes(found)] if found.saw else [],
        "lines": [": ".join(line) for line in lines(found)],
    }


def _answer_data(found: FileDiagnosis, given: Answer) -> dict[str, Any]:
    return {
        "tool": given.tool.name,
        "title": given.tool.title,
        "release": given.tool.release,
        "field": given.tool.field,
        "effect": given.effect,
        "strength": given.strength,
        "times_too_strong": given.gain,
        "says": given.says,
        "sure": given.sure,
        "findings": [finding.page for finding in given.findings if finding.page],
        "notes": list(given.notes),
        "repair_to": given.instead,
        "do": _what_to_do(found, given),
    }
