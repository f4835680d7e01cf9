"""The self-test by families of faults: how many were put in on purpose, found, and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from harness.report.models import PowerRecord


@dataclass(frozen=True)
class Family:
    """Loaders that are wrong in related ways, by the file they are written in."""

    name: str
    records: tuple[PowerRecord, ...]

    @property
    def found(self) -> int:
        """How many were blamed for anything."""
        return sum(record.detected for record in self.records)

    @property
    def named(self) -> int:
        """How many were blamed for their fault and nothing else."""
        return sum(record.named or 0 for record in self.records)

    @property
    def examples(self) -> float | None:
        """The median number of examples until the first failure, of those that random examples show."""
        seen = [record.examples for record in self.records if record.examples is not None]
        return float(median(seen)) if seen else None

    @property
    def fine(self) -> bool:
        """Whether all were found and named."""
        return all(record.fine for record in self.records)


def of_weights(records: Sequence[PowerRecord]) -> list[PowerRecord]:
    """Return the records that speak of weights, not of pictures."""
    return [record for record in records if record.source == "weights" and record.images is None]


def families(records: Sequence[PowerRecord]) -> list[Family]:
    """Return the families of the broken loaders, in the order in which they were tried."""
    found: dict[str, list[PowerRecord]] = {}
    for record in of_weights(records):
        if record.fault:
            found.setdefault(record.subject.partition(":")[0], []).append(record)
    return [Family(name, tuple(group)) for name, group in found.items()]
