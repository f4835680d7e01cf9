"""One answer for one file: what it is, what a tool does with it, what to pass there, what else to do, how sure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.doctor.answer import BY_NAME, EVERY, Answer, Effect, Question, how_sure
from harness.doctor.answers import answer, answers, why_not
from harness.doctor.causes import Saw, causes
from harness.doctor.inspect.weights import Weighed, weigh
from harness.doctor.mending import command, repaired_to, wants_a_base
from harness.doctor.on_base import Held, held_against, on_base
from harness.doctor.trainers import about_alpha, rule_of, trainer_of, with_rule
from harness.doctor.traits import Traits
from harness.doctor.what_it_is import model_of, what_it_is
from harness.errors import UserError
from harness.files import Problem, read_lora
from harness.law.findings import is_within
from harness.law.known import Tool, tools
from harness.law.scale import word_of
from harness.text import count, printable
from harness.verdict.file_record import BaseFit, Hazard

_GRAVE = {
    "LH707": "no repair makes NaN right: take an earlier step of the training",
    "LH713": "no number shows anything, since it adds nothing: take another step of the training",
}
_CANNOT: tuple[Effect, ...] = ("hangs", "raises", "nothing", "drops", "wrong", "factor", "cannot")


@dataclass(frozen=True)
class FileDiagnosis:
    """A file and the question that was asked about it; `tool` None asks for all.

    `held` says how much of the file applies to the base that was given.
    """

    path: Path
    traits: Traits
    asked: Question
    tool: Tool | None = None
    saw: Saw | None = None
    held: Held | None = None
    weighed: Weighed = field(default_factory=Weighed)

    @property
    def fit(self) -> BaseFit | None:
        """How much of the file applies to the base, None without one."""
        return self.held.fit if self.held else None

    @property
    def misfits(self) -> tuple[Hazard, ...]:
        """What is wrong with the file on the base."""
        return self.held.hazards if self.held else ()

    @cached_property
    def trainer(self) -> str | None:
        """The tool that wrote the metadata, as far as they tell."""
        return trainer_of(self.traits.adapter.metadata)

    @property
    def rule(self) -> str | None:
        """The rule of the trainer that a file without alpha goes by, None where there is an alpha or no such rule."""
        return rule_of(self.traits, self.asked.lora_alpha)

    @cached_property
    def question(self) -> Question:
        """What is asked of every tool, the trainer's rule included."""
        return with_rule(self.traits, self.asked)

    @cached_property
    def answers(self) -> dict[str, Answer]:
        """The answer of the tool that was asked for, or of all that read the format."""
        if self.tool:
            found = {self.tool.name: answer(self.tool, self.traits, self.question)}
        else:
            found = answers(self.traits, self.question)
        return on_base(found, self.held, self.traits)

    @property
    def grave(self) -> tuple[Hazard, ...]:
        """What the weights themselves say is wrong: NaN (LH707), no effect (LH713), dead modules (LH714)."""
        return tuple(hazard for hazard in self.weighed.hazards if hazard.code in _GRAVE)

    @property
    def fatal(self) -> list[Problem]:
        """What makes modules of the file unreadable."""
        return [problem for problem in self.traits.adapter.problems if problem.fatal]

    @property
    def is_for_another(self) -> bool:
        """Tell whether nothing of the file applies to the base that was given, or layers of it have other shapes."""
        return self.fit is not None and (not self.fit.applied or any(each.code == "LH719" for each in self.misfits))

    @property
    def exit_code(self) -> int:
        """0 answered, 1 the file is broken, for another base, or not applied as trained by the tool asked for."""
        broken = bool(self.fatal or self.grave or self.is_for_another)
        bad = self.tool and self.answers[self.tool.name].effect in _CANNOT
        return int(broken or bool(bad))


def diagnose(
    path: Path | str, *, tool: str | None = None, asked: Question | None = None, saw: Saw | None = None,
    base: Path | None = None, headers_only: bool = False,
) -> FileDiagnosis:  # fmt: skip
    """Read a file and return its diagnosis.

    Every weight is looked at once, for NaN and for factors that are zero, unless `headers_only`.

    Raises:
        LoraFileError: the file, or the base, cannot be read.
        UserError: nobody knows the tool.
    """
    traits = Traits(read_lora(path, strict=False))
    asked = asked or Question()
    asked = replace(asked, version=_plain_version(asked.version), base=base)
    known = tool_named(tool, asked.version) if tool else None
    held = held_against(traits, base) if base else None
    weighed = Weighed() if headers_only else weigh(traits.adapter)
    return FileDiagnosis(Path(path), traits, asked, known, saw, held, weighed)


def tool_named(name: str, version: str | None = None) -> Tool:
    """Return a tool by its name, or the beginning of its name or title; of its rows the one for `version`.

    Raises:
        UserError: there is no such tool, or several.
    """
    every = tools()
    wanted = next((tool.name for tool in every.values() if _plain(name) in map(_plain, (tool.name, *tool.also))), "")
    if wanted:
        rows = [tool for tool in every.values() if tool.name == wanted or tool.name.startswith(f"{wanted}-")]
        fits = (tool for tool in rows if version and tool.versions and is_within(version, tool.versions))
        return next(fits, every[wanted])
    asked = name.strip().lower()
    found = [tool for tool in every.values() if asked and (tool.name.startswith(asked) or asked in tool.title.lower())]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(tool.name for tool in found or every.values() if tool.release)
    what = "several tools" if found else f"no such tool{_perhaps(asked)}, ask without it for all that are known"
    raise UserError(f"tool={printable(name, 40)!r}: {what}; known are {listed}")


def _perhaps(asked: str) -> str:
    """Return a question for the tool whose name is nearest to what was asked for, empty where none is near."""
    names = [name for tool in tools().values() for name in (tool.name, *tool.also) if tool.release]
    near = get_close_matches(asked, names, n=1, cutoff=0.75)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _plain_version(version: str | None) -> str | None:
    """Return a release as the tables have it, for one as tools print it (`v0.3.64`)."""
    return re.sub(r"^v(?=\d)", "", version.strip(), flags=re.IGNORECASE) if version else version


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
        yield "do", _GRAVE[found.grave[0].code]
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
            "no number makes this right there" if given.effect in _CANNOT else "not known from this file alone",
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
    if broken := next((_GRAVE[hazard.code] for hazard in found.grave), ""):
        return broken
    if given.instead:
        repair = command(found.path, found.traits, found.question, given.instead)
        return repair if given.instead in given.tool.formats else f"{repair}, then {given.tool.convert}"
    if given.do:
        return given.do
    if given.effect == "law" and given.strength is None:
        return "give the alpha of the training: --lora-alpha N"
    if given.effect in _CANNOT and (to := _once_alpha_is_known(found, given)):
        return f"give the alpha of the training, --lora-alpha N: `repair --to {to}` then writes a file that it reads"
    if given.effect in _CANNOT:
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
    return "nothing else"


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
        how += [given.modules.rstrip(",")] if given.modules not in ("", EVERY, BY_NAME) and how == [standard] else []
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
