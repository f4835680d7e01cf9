"""What each release of a loader was measured to do with plain LoRA: the committed table, as data.

`releases.json` is written by `python -m benchmarks.releases`, which runs the code of every release.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.law.law import TRAINED, Law, law_of_formula
from harness.law.probe import Probe
from harness.law.traits import TRAITS

_OF_FILES = ("alpha", "rank", "file")
_SAME = 1e-9
TABLE = Path(__file__).with_name("releases.json")
NOTHING, RAISES, NO_LAW = "loads nothing", "raises", "no single law"
SOME = "; raises on some files"
NO_MODEL = "no such model in this release"
SLOW, KILLED = "not judged: too slow", "not judged: killed from outside"
NOT_JUDGED = (SLOW, KILLED)
SPELLED = {
    "kohya": "lora_unet.down.tensor",
    "diffusers": "transformer.A.header",
    "diffsynth": "bare.default.tensor",
    "peft": "base_model.A.config",
}
"""How the checks write the files of a format, as `doctor/traits.py` names spellings of keys."""


@dataclass(frozen=True)
class Released:
    """What one release does in one cell: `state` is its law as text, or why it has none; `day` when it was measured.

    `trait` is the condition under which it is so; files without it get what they were trained with.
    """

    state: str
    trait: str | None
    what: str
    day: str

    @property
    def law(self) -> Law | None:
        """The law, None where the state names none."""
        return law_of_formula(self.state)

    def laws(self, probes: Sequence[Probe]) -> list[Law] | None:
        """Return the law of every module of a file, given as probes; None where the trait does not tell which it has.

        Probes hold the alphas and ranks of the whole file; what they measured is not looked at.
        """
        law, trait = self.law, TRAITS.get(self.trait or "")
        if law is None:
            return None
        if self.trait is None:
            return [law] * len(probes)
        if law.strength != TRAINED.strength:
            return None
        if all(abs(law.scale(probe) - TRAINED.scale(probe)) < _SAME for probe in probes):
            return [TRAINED] * len(probes)
        if trait is None or trait.about not in _OF_FILES:
            return None
        return [law if trait(probe) else TRAINED for probe in probes]


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return {table["loader"]: table for table in json.loads(TABLE.read_text(encoding="utf-8"))}


def table_of(loader: str) -> Mapping[str, Any] | None:
    """Return what was measured of a loader's releases, as it is kept; None where nothing was."""
    return _tables().get(loader)


@cache
def versions_of(loader: str) -> tuple[str, ...]:
    """Return the releases of a loader that were measured, the oldest first; none for a loader without a table."""
    return tuple(row["version"] for row in _releases(loader) if row["cells"])


def _releases(loader: str) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = (table_of(loader) or {}).get("releases", ())
    return found


def released(loader: str, version: str, form: str, bench: str) -> Released | None:
    """Return what a release does with files of a format on a bench, None where it was not measured."""
    cells = (cell for row in _releases(loader) if row["version"] == version for cell in row["cells"])
    cell = next((each for each in cells if (each["format"], each["bench"]) == (form, bench)), None)
    if cell is None or cell["state"] in NOT_JUDGED:
        return None
    return Released(cell["state"], cell["trait"], cell["what"], _tables()[loader]["created"][:10])
