"""What the site knows of each loader: its row of `tools.toml`, the runs that it was seen in, what it reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from harness.files import FORMATS
from harness.law.findings import Finding, findings
from harness.law.known import ScaleLaw, Tool, prescribe, tools
from harness.law.reads import LABELS, every_row, kind_of, title_of
from harness.report.known import KnownGroup, known_groups
from harness.report.matrix import Line, as_trained, lines
from harness.report.records import Run
from harness.report.summary import OUTCOMES, cells, digest, pretty_formula
from harness.verdict.verdict import LawRecord, Verdict

RANKS = (4, 8, 16, 32, 64, 128)
ALPHAS = (1.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
ASKED = (32, 16.0)
_WORDS: tuple[Literal["strength", "alpha", "rank"], ...] = ("strength", "alpha", "rank")
_SAFE = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class UniformFile:
    """A file whose modules all have one rank and one alpha: what a table of answers is made for."""

    alpha: float | None
    rank: int
    rslora: bool = False
    keys: Mapping[str, str] = field(default_factory=lambda: {"alpha": ""})
    variant: str = "lora"
    unscaled: bool = False
    stacked: int = 1


@dataclass(frozen=True)
class Seen:
    """A release of a loader in a run: its line of the matrix, its verdicts, the law of plain LoRA."""

    loader: str
    version: str
    created: str
    run_id: str
    line: Line
    verdicts: tuple[Verdict, ...]

    @property
    def known(self) -> list[KnownGroup]:
        """Its known failures by finding."""
        return known_groups(self.verdicts)

    @property
    def outcome(self) -> str:
        """The worst outcome of its cells."""
        return min((cell.outcome for cell in self.line.cells), key=OUTCOMES.index, default="skipped")

    @property
    def laws(self) -> list[str]:
        """The laws that were measured on files with an alpha, the trained one first."""
        found = [cell.law for cell in self.line.cells if cell.law and cell.variant == "lora"]
        every = {pretty_formula(law.formula): law for law in found}
        return sorted(every, key=lambda formula: not as_trained(every[formula]))

    @property
    def law(self) -> LawRecord | None:
        """The law of plain LoRA, where all its cells that have one agree."""
        found = {cell.law.formula: cell.law for cell in self.line.cells if cell.law and cell.variant == "lora"}
        return next(iter(found.values())) if len(found) == 1 else None


def seen_in(runs: Iterable[Run]) -> dict[tuple[str, str], Seen]:
    """Return every release of every loader in the runs; of several runs of one release the newest counts."""
    found: dict[tuple[str, str], Seen] = {}
    for run in sorted(runs, key=lambda run: run.header.created):
        for line in lines(cells(run)):
            own = tuple(v for v in run.verdicts if v.loader == line.loader)
            version = next((v.loader_version for v in own if v.loader_version), "")
            header = run.header
            found[line.loader, version] = Seen(line.loader, version, header.created, header.run_id, line, own)
    return found


@dataclass(frozen=True)
class Loader:
    """One loader of the site: `seen` are its releases in the runs, the newest last; `tool` what is known of it."""

    name: str
    seen: tuple[Seen, ...] = ()
    tool: Tool | None = None

    @property
    def slug(self) -> str:
        """The name as a part of an address."""
        low = self.name.lower()
        return low if _SAFE.fullmatch(low) else f"{re.sub(r'[^a-z0-9]+', '-', low).strip('-')[:40]}-{digest(self.name)}"

    @property
    def title(self) -> str:
        """What people call it."""
        return self.tool.title if self.tool else self.name

    @property
    def release(self) -> str:
        """The release that is spoken of."""
        return self.tool.release if self.tool else next((s.version for s in reversed(self.seen) if s.version), "")

    @property
    def label(self) -> str:
        """Name and release."""
        return f"{self.title} ({self.release})" if self.release else self.title

    @property
    def provenance(self) -> str:
        """How its law is known."""
        if self.tool:
            return self.tool.provenance if self.tool.release else "an example of this repository"
        return f"measured in the run of {self.seen[-1].created[:10]}"

    @property
    def measured(self) -> bool:
        """Whether its own code was measured, and not only read."""
        return bool(self.seen) or bool(self.tool and self.tool.known == "measured")

    @cached_property
    def excused(self) -> list[KnownGroup]:
        """What the runs excuse and its findings do not say."""
        told = {finding.page for finding in self.findings}
        groups = (group for seen in self.seen for group in seen.known if group.page not in told)
        return list({group.page or group.what: group for group in groups}.values())

    @property
    def faults(self) -> list[str]:
        """What it is known to get wrong: findings by their names, and what else the runs excuse."""
        return [*(finding.page for finding in self.findings), *(group.page or group.what for group in self.excused)]

    @cached_property
    def law(self) -> ScaleLaw | None:
        """Its scaling law, None where it is not one power law."""
        if self.tool:
            return self.tool.law
        record = self.seen[-1].law
        if record is None or record.constant is None or None in record.exponents.values():
            return None
        strength, alpha, rank = (record.exponents.get(word) or 0.0 for word in _WORDS)
        return ScaleLaw.of_powers(self.name, strength, alpha, rank, record.constant)

    @property
    def formula(self) -> str:
        """Its law as text, empty where there is none to give."""
        return pretty_formula(self.law.law.formula) if self.law else ""

    @property
    def right(self) -> bool | None:
        """Whether it scales as training did; None: no law is known."""
        return None if self.law is None else self.law.law.is_trained

    @property
    def argument(self) -> str:
        """What its users call the strength; empty where they cannot give one."""
        named = self.tool.field if self.tool else "strength"
        return "" if named.startswith("(none") else named

    @property
    def multiplies(self) -> bool:
        """Whether the number is what to multiply its field by, which lies beside the file."""
        return self.tool is not None and self.tool.in_config

    def number(self, rank: int, alpha: float) -> float | None:
        """Return what to pass for a file of one rank and alpha, None where no number is right."""
        return prescribe(self.law, [UniformFile(alpha, rank)]) if self.law else None

    @cached_property
    def answers(self) -> list[tuple[int, list[float | None]]]:
        """What to pass, by rank, for each alpha of ALPHAS."""
        return [(rank, [self.number(rank, alpha) for alpha in ALPHAS]) for rank in RANKS] if self.law else []

    @cached_property
    def findings(self) -> list[Finding]:
        """The findings that speak of it, in the release that is spoken of."""
        name, tool = self.name, self.tool
        every = (f for f in findings().values() if name in f.tools or f.loader == name)
        return [f for f in every if not (tool and tool.release) or f.in_release(tool.release.split(" ")[0])]

    @cached_property
    def reads(self) -> dict[str, list[tuple[str, list[tuple[str, list[str]]]]]]:
        """What becomes of each spelling of keys: architecture -> (whose names, (outcome, spellings))."""
        found: dict[str, dict[str, dict[str, list[str]]]] = {}
        for row in every_row():
            if row["tool"] == self.name:
                label = LABELS[kind_of(row["uniform"])]
                found.setdefault(row["family"], {}).setdefault(row["names"], {}).setdefault(label, []).append(
                    row["scheme"]
                )
        return {
            title_of(family): [(names, list(by_label.items())) for names, by_label in by_names.items()]
            for family, by_names in found.items()
        }

    @cached_property
    def shares(self) -> dict[str, tuple[int, int]]:
        """How many of the spellings that were tried it reads as trained, by architecture."""
        right, tried = dict[str, int](), dict[str, int]()
        for row in every_row():
            if row["tool"] == self.name:
                name = title_of(row["family"])
                tried[name] = tried.get(name, 0) + 1
                right[name] = right.get(name, 0) + (row["uniform"] == "ok")
        return {name: (right[name], tried[name]) for name in tried}

    @property
    def formats(self) -> list[str]:
        """The formats that it reads, or was tried with."""
        seen = (fmt for one in self.seen for fmt in one.line.formats if fmt in FORMATS)  # no other column of the matrix
        return list(dict.fromkeys([*(self.tool.formats if self.tool else ()), *seen]))

    def in_format(self, name: str) -> str | None:
        """Return the worst outcome of a format in the newest run, None where it was not measured."""
        outcomes = [c.outcome for one in self.seen for c in one.line.cells if c.format == name]
        return min(outcomes, key=OUTCOMES.index, default=None)


def site_loaders(runs: Sequence[Run]) -> list[Loader]:
    """Return every loader that a run or the table of tools knows, those of the runs first."""
    every = seen_in(runs)
    names = dict.fromkeys([*(loader for loader, _ in every), *tools()])
    return [_loader(name, every) for name in names]


def _loader(name: str, every: Mapping[tuple[str, str], Seen]) -> Loader:
    tool = tools().get(name)
    own = tuple(seen for (loader, _), seen in every.items() if loader in _names(name, tool))
    return Loader(name, own, tool)


def _names(name: str, tool: Tool | None) -> Iterator[str]:
    yield name
    if tool and tool.loader:
        yield tool.loader


def releases_of(loader: Loader, every: Sequence[Loader]) -> list[Loader]:
    """Return the loaders that are releases of one tool: `diffsynth` and `diffsynth-2.0.4`."""
    return [other for other in every if stem_of(other) == stem_of(loader)]


def stem_of(loader: Loader) -> str:
    """Return the name of a loader without the release that may stand in it."""
    return re.sub(r"-\d[\d.]*$", "", loader.name)
