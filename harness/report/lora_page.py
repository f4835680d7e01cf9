"""LoRA files as one self-contained page: a section per file (`inspect`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.law.known import tools
from harness.outputs import replace_file, saying
from harness.report.energy_map import EnergyMap, energy_maps
from harness.report.html import asset, environment, policy
from harness.text import count, plain
from harness.verdict.blocks import BlockEnergy, by_block, in_order
from harness.verdict.codes import CODES, SEVERITIES
from harness.verdict.file_record import FileRecord, ModuleEnergy

_LOOKS = {"fine": "passed", "subtle": "xfailed", "too strong": "xpassed", "broken": "failed"}
_WORST = ("errored", "failed", "refused", "xpassed", "xfailed", "skipped", "passed")
_MOST_MODULES = 3000
_TITLES = 3
_LEGEND = (0.07, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Shown:
    """One file as the page shows it; `anchor` is its id."""

    record: FileRecord
    anchor: str

    @cached_property
    def outlook(self) -> tuple[str, str, str]:
        """The look, one word and the reason: what the energies say, else what the hazards do."""
        record = self.record
        if not record.readable:
            return "errored", "unreadable", record.hazards[0].what if record.hazards else "cannot be read"
        if record.advice:
            return _LOOKS[record.advice.outlook], record.advice.outlook, record.advice.reason
        bad = sorted(record.hazards, key=lambda hazard: SEVERITIES.index(hazard.severity))
        if bad:
            said = "; ".join(dict.fromkeys(_title(hazard.code) for hazard in bad[:_TITLES]))
            return ("xfailed" if record.severity == "warning" else "failed"), count(len(bad), "hazard"), said
        return "passed", "no hazard", f"{record.headline} The option --base tells how strong it is."

    @cached_property
    def blocks(self) -> list[BlockEnergy]:
        """The energies by block."""
        return by_block(self.record.energies or {})

    @cached_property
    def most(self) -> float:
        """The energy of the strongest block, 1 when there is none."""
        return max((block.energy or 0.0 for block in self.blocks), default=0.0) or 1.0

    @cached_property
    def maps(self) -> list[EnergyMap]:
        """The maps of the energies."""
        return energy_maps(self.record.energies or {})

    @cached_property
    def legend(self) -> list[tuple[float, float]]:
        """(opacity, energy) of a few shades."""
        most = self.maps[0].most if self.maps else 0.0
        return [(shade, most * (shade - _LEGEND[0]) / (1 - _LEGEND[0])) for shade in _LEGEND] if most else []

    @cached_property
    def modules(self) -> list[tuple[str, ModuleEnergy]]:
        """The first modules in the order of their numbers, with their energies."""
        energies = self.record.energies or {}
        return [(name, energies[name]) for name in sorted(energies, key=in_order)[:_MOST_MODULES]]

    @cached_property
    def relative(self) -> bool:
        """True when energies are ||ΔW|| / ||W||."""
        return any(block.relative is not None for block in self.blocks)

    @property
    def measure(self) -> str:
        """What an energy is."""
        return "‖ΔW‖ / ‖W‖" if self.relative else "‖ΔW‖"

    @property
    def map_text(self) -> str:
        """What the maps show, in words."""
        strongest = max(self.blocks, key=lambda block: block.energy or 0.0)
        quiet = sum(block.energy == 0 for block in self.blocks)
        rest = f"; {count(quiet, 'block')} without any change" if quiet else ""
        number = f"{len(self.record.energies or {})} modules in {len(self.blocks)} blocks"
        said = f"{self.measure} by module: {number}, the most in {strongest.name[:80]}{rest}"
        return plain(f"{said}. The tables below have the numbers.")


def _title(code: str) -> str:
    return CODES[code].title if code in CODES else code  # of a newer version


def write_lora_page(records: Sequence[FileRecord], path: Path | str, *, command: str = "lora-harness inspect") -> Path:
    """Write the page to `path`, replacing it in one step, and return the path.

    Raises:
        UserError: there is no record, `path` does not end in .html, or it cannot be written.
    """
    path = checked_target(path)
    if not records:
        raise UserError(f"{path}: there is no file to show")
    with saying(path, "the page cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, render_lora_page(records, command=command).encode("utf-8", "backslashreplace"))
    return path


def checked_target(path: Path | str) -> Path:
    """Refuse a file name that is no page's, so that a LoRA given in the wrong place is never overwritten.

    Raises:
        UserError: `path` does not end in .html.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: the page is written to a file that ends in .html")
    return path


def render_lora_page(records: Sequence[FileRecord], *, command: str = "lora-harness inspect") -> str:
    """Return the page as HTML text: a pure function of the records."""
    shown = [Shown(record, f"file-{index}") for index, record in enumerate(records, 1)]
    parts = generated(
        "lora.html.j2",
        asset("lora.js"),
        files=shown,
        headline=_headline(shown),
        look=min((one.outlook[0] for one in shown), key=_WORST.index),
        codes=CODES,
        tools=tools(),
        command=command,
    )
    return "".join(parts)


def generated(template: str, script: Any, **parts: Any) -> Iterator[str]:
    """Yield a page about files as HTML text, with the style and `script` that its policy allows."""
    style, page = asset("report.css") + asset("lora.css"), environment()
    page.filters["counted"] = counted
    shared = {"policy": policy(script, style), "style": style, "script": script}
    return page.get_template(template).generate(**shared, **parts)


def _headline(shown: Sequence[Shown]) -> str:
    if len(shown) == 1:
        return shown[0].outlook[2][:1].upper() + shown[0].outlook[2][1:]
    words = Counter(one.outlook[1] if "hazard" not in one.outlook[1] else "with hazards" if one.record.hazards else
                    "without hazard" for one in shown)  # fmt: skip
    return f"{len(shown)} LoRA files: " + ", ".join(f"{number} {word}" for word, number in words.most_common())


def counted(values: dict[str, int]) -> str:
    """Return a histogram as text."""
    return next(iter(values)) if len(values) == 1 else ", ".join(f"{value} ({n}×)" for value, n in values.items())
