"""One answer for one file: what it is, what a tool does with it, what to pass there, what else to do, how sure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from harness.doctor.answer import Answer, Effect, Question
from harness.doctor.answers import answer, answers
from harness.doctor.causes import Saw
from harness.doctor.inspect.weights import Weighed, weigh
from harness.doctor.on_base import Held, held_against, on_base
from harness.doctor.trainers import rule_of, trainer_of, with_rule
from harness.doctor.traits import Traits
from harness.errors import UserError
from harness.files import Problem, read_lora
from harness.law.findings import is_within
from harness.law.known import Tool, tools
from harness.text import printable
from harness.verdict.file_record import BaseFit, Hazard

GRAVE = {
    "LH707": "no repair makes NaN right: take an earlier step of the training",
    "LH713": "no number shows anything, since it adds nothing: take another step of the training",
}
CANNOT: tuple[Effect, ...] = ("hangs", "raises", "nothing", "drops", "wrong", "factor", "cannot")


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
        return tuple(hazard for hazard in self.weighed.hazards if hazard.code in GRAVE)

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
        bad = self.tool and self.answers[self.tool.name].effect in CANNOT
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
