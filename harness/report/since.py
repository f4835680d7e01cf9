"""Verdicts of an earlier run that are carried over: of cells in which nothing has changed that they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from harness.report.models import CellRecord, ProbeRecord
from harness.report.records import Run
from harness.text import count, on_one_line
from harness.verdict.verdict import Carried, Record, Verdict

_R = TypeVar("_R", Verdict, ProbeRecord)
Place = tuple[str, str | None, str | None, str]  # loader, format, bench, variant


@dataclass(frozen=True)
class Earlier:
    """An earlier run, asked for what still holds; `checks` are the checks whose verdicts belong to a cell."""

    run: Run
    checks: frozenset[str]

    def still_holds(self, prints: Mapping[tuple[str, str, str, str], str | None]) -> dict[Place, list[Record]]:
        """Return the records of each cell whose fingerprint in `prints` is the one that it had.

        A cell with an errored verdict is measured again: what ended its process may have come from outside.
        """
        before = {_place(cell): cell for cell in self.run.of(CellRecord)}
        same: list[Place] = [p for p, now in prints.items() if now and p in before and before[p].fingerprint == now]
        verdicts, probes = _by_place(self.run.verdicts), _by_place(self.run.of(ProbeRecord))
        found: dict[Place, list[Record]] = {}
        for place in same:
            told = [verdict for verdict in verdicts.get(place, ()) if verdict.check in self.checks]
            if told and all(verdict.outcome not in ("errored", "xpassed") for verdict in told):
                found[place] = [*map(self._carried, told), *probes.get(place, ()), before[place]]
        return found

    def _carried(self, verdict: Verdict) -> Verdict:
        here = Carried(run=self.run.header.run_id, measured=self.run.header.created)
        return verdict.model_copy(update={"carried": verdict.carried or here})


def _place(record: CellRecord | Verdict | ProbeRecord) -> Place:
    return record.loader, record.format, record.bench, record.variant


def _by_place(records: Iterable[_R]) -> dict[Place, list[_R]]:
    found: dict[Place, list[_R]] = {}
    for record in records:
        found.setdefault(_place(record), []).append(record)
    return found


def carried_sentence(run: Run) -> str:
    """Say which cells were not measured in this run, and when they were; empty when all were."""
    cells = ((count(number, "cell"), where) for where, number in run.carried.items())
    said = on_one_line("; ".join(f"{told} from run {where.run}, measured {where.measured}" for told, where in cells))
    return f"Carried over, not measured again: {said}." if said else ""
