"""A whole library in one look: what is wrong in how many of its files, where they lie and where they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from harness.law.findings import Finding, findings
from harness.text import count
from harness.verdict.codes import CODES, SEVERITIES
from harness.verdict.file_record import NO_LORA, FileRecord

_BASE_KEYS = ("ss_base_model_version", "modelspec.architecture", "base_model_name_or_path", "ss_sd_model_name")
_NOT_SAID = "not said"
_FINE = len(SEVERITIES)
_EXAMPLES = 5  # files that a tally names
_MOST_SENTENCES = 2  # whether there is one sentence or there are several is all that is asked
_BROKEN = (0, 1)  # places in SEVERITIES of what is wrong for every reader


def gravity(row: FileRecord) -> int:
    """Return the place of the worst hazard's severity in SEVERITIES, behind the last for a fine file or no LoRA."""
    return SEVERITIES.index(row.severity) if row.severity and not row.is_other else _FINE


def is_broken(row: FileRecord) -> bool:
    """Tell whether something is wrong with the file for every reader."""
    return gravity(row) in _BROKEN


def worst_code(row: FileRecord) -> str:
    """Return the code of the worst hazard, empty when there is none."""
    return min(row.hazards, key=lambda h: SEVERITIES.index(h.severity)).code if row.hazards else ""


def folder_of(row: FileRecord) -> str:
    """Return the folder, or the URL, that a file lies in."""
    return row.path.rpartition("/")[0] or "."


def base_of(row: FileRecord) -> str:
    """Return the base model that the file's metadata name."""
    return next((row.metadata[key] for key in _BASE_KEYS if row.metadata.get(key)), _NOT_SAID)


def trainer_of(row: FileRecord) -> str:
    """Return the tool that wrote the file, as far as it says so."""
    return row.trainer or _NOT_SAID


@dataclass
class Tally:
    """How many files share something, how many of them are broken, the first of them, and what is said of them."""

    files: int = 0
    broken: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    def add(self, row: FileRecord, sentence: str = "") -> None:
        """Count one file more, of which `sentence` is said."""
        self.files += 1
        self.broken += is_broken(row)
        if len(self.first) < _EXAMPLES:
            self.first.append((row.path, sentence))
        if sentence and len(self.sentences) < _MOST_SENTENCES and sentence not in self.sentences:
            self.sentences.append(sentence)

    @property
    def sentence(self) -> str:
        """What is said of all of them, empty when it is not one thing."""
        return self.sentences[0] if len(self.sentences) == 1 else ""


class Library:
    """The rows of an audit, counted in one pass.

    `codes`, `folders`, `bases`, `trainers` and `findings` map to a `Tally`; `others` (without a known LoRA),
    `unreadable`, `hazardous`, `hit` (by a finding) and `copies` count files; `worst` are the first `most` rows, the
    gravest first.
    """

    def __init__(self, rows: Iterable[FileRecord], *, most: int = 100) -> None:
        self.total = self.others = self.unreadable = self.hazardous = self.hit = self.copies = 0
        self.codes: dict[str, Tally] = {}
        self.folders: dict[str, Tally] = {}
        self.bases: dict[str, Tally] = {}
        self.trainers: dict[str, Tally] = {}
        self.findings: Counter[str] = Counter()
        kept: list[list[FileRecord]] = [[] for _ in range(_FINE + 1)]
        for row in rows:
            self._count(row)
            same = kept[gravity(row)]
            if len(same) < most:
                same.append(row)
        self.worst = [row for same in kept for row in same][:most]

    def _count(self, row: FileRecord) -> None:
        self.total += 1
        self.others += row.is_other
        self.unreadable += not row.readable and not row.is_other
        self.hazardous += bool(row.hazards) and row.readable
        self.hit += bool(row.findings)
        self.copies += row.duplicate_of is not None
        self.findings.update(set(row.findings))
        for table, key in (
            (self.folders, folder_of(row)),
            (self.bases, base_of(row)),
            (self.trainers, trainer_of(row)),
        ):
            table.setdefault(key, Tally()).add(row)
        for code, what in {hazard.code: hazard.what for hazard in row.hazards}.items():
            self.codes.setdefault(code, Tally()).add(row, what)

    @property
    def headline(self) -> str:
        """The library in one sentence."""
        loras = self.total - self.others
        parts = [f"{loras - self.hazardous - self.unreadable:,} without hazards"]
        parts += [f"{self.hazardous:,} with"] if self.hazardous else []
        parts += [f"{self.unreadable:,} unreadable"] if self.unreadable else []
        parts += [f"{self.hit:,} that a finding hits"] if self.hit else []
        parts += [f"{self.copies:,} with the weights of another"] if self.copies else []
        beside = f"; {count(self.others, 'file')} without a known LoRA" if self.others else ""
        return f"{count(loras, 'LoRA file')}: {', '.join(parts)}{beside}"

    def by_gravity(self) -> Iterator[tuple[str, Tally]]:
        """Yield (code, tally), what is broken first, then what is most frequent; files that are no LoRA come last."""

        def order(item: tuple[str, Tally]) -> tuple[int, int]:
            known = CODES.get(item[0])
            place = SEVERITIES.index(known.severity if known else "warning")
            return _FINE if item[0] == NO_LORA else place, -item[1].files

        yield from sorted(self.codes.items(), key=order)

    def hits(self) -> list[tuple[str, int, Finding | None]]:
        """Return (page, number of files that it hits, the finding), the most frequent first."""
        ordered = sorted(self.findings.items(), key=lambda item: (-item[1], item[0]))
        return [(page, times, findings().get(page)) for page, times in ordered]


def most_of(table: dict[str, Tally], most: int) -> list[tuple[str, Tally]]:
    """Return the first entries of a table: those with broken files first, then the largest."""
    return sorted(table.items(), key=lambda item: (-item[1].broken, -item[1].files))[:most]
