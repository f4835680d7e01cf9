"""What the report's template shows: every decision made here, every escape made there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from harness.report.models import ProbePoint, ProbeRecord
from harness.report.records import Run
from harness.report.summary import (
    OUTCOMES,
    MatrixCell,
    causes,
    cells,
    digest,
    distance,
    matrix_columns,
    matrix_rows,
)
from harness.report.svg import available, law_figure
from harness.verdict.blocks import by_block
from harness.verdict.file_record import FileRecord, ModuleEnergy
from harness.verdict.verdict import Verdict

_MOST_FIGURES = 36
_MOST_TOLD = 500
_MOST_TOLD_PER_CAUSE = 25
_MOST_POINTS = 200
_MOST_ENERGIES = 24
_MOST_BLOCKS = 120
STATUS_WORDS = {"passed": "passed", "failed": "failed", "incomplete": "incomplete", "cut": "cut short"}
STATUS_LOOKS = {"passed": "passed", "failed": "failed", "incomplete": "skipped", "cut": "errored"}


@dataclass(frozen=True)
class LawPlot:
    """A law's figure, None when there are too many of them, and its points, the worst first."""

    record: ProbeRecord
    figure: Markup | None
    points: tuple[ProbePoint, ...]
    left_out: int

    @property
    def anchor(self) -> str:
        """The plot's stable id inside a report."""
        return _law_anchor(self.record)


class ReportView:
    """The parts of a report that are computed from the verdicts and probes of one run.

    `cells` are the measured cells by loader, format, bench and variant, `formats` and `matrix` the columns and lines
    they make; `causes` the failures folded by cause, worst first; `counts` the outcomes that occurred with their
    numbers; `loose` the verdicts that belong to no format (images, files, smoke checks); `plots` one plot per law, the
    cells that fail first; `energies` the energy by block of the first files that carry one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cells = cells(run)
        self.formats, self.matrix = matrix_columns(self.cells), matrix_rows(self.cells)
        self.causes = causes(run.verdicts)
        self.counts = [(outcome, run.counts[outcome]) for outcome in OUTCOMES if run.counts.get(outcome)]
        self.loose = [verdict for verdict in run.verdicts if verdict.format is None]
        records = sorted(run.of(ProbeRecord), key=lambda record: -_spread(record))
        self.plots = [_plot(record, drawn=i < _MOST_FIGURES) for i, record in enumerate(records)]
        found = ((record, energy_by_block(record)[:_MOST_BLOCKS]) for record in run.of(FileRecord))
        self.energies = [(record, blocks) for record, blocks in found if blocks][:_MOST_ENERGIES]
        self._anchors, self._plotted = _anchors(run.verdicts), {plot.anchor for plot in self.plots}

    @cached_property
    def told(self) -> set[int]:
        """The violations whose text is shown in full; the page stays under 5 MB, the records hold the rest."""
        first = [verdict for cause in self.causes for verdict in cause.verdicts[:_MOST_TOLD_PER_CAUSE]]
        return {id(verdict) for verdict in first[:_MOST_TOLD]}

    def in_full(self, verdict: Verdict) -> bool:
        """Return True when a violation is shown with all its rows."""
        return id(verdict) in self.told

    def anchor(self, verdict: Verdict) -> str:
        """Return the verdict's stable id."""
        return self._anchors[id(verdict)]

    def plot(self, cell: MatrixCell) -> str | None:
        """Return the id of the plot of the cell's law, None when there is none."""
        anchor = _law_anchor(cell)
        return anchor if anchor in self._plotted else None

    def evidence(self, cell: MatrixCell) -> str:
        """Return the id that a cell of the matrix links to: its worst failure, or its checks."""
        return cell.anchor if cell.worst is None or cell.worst.ok else self.anchor(cell.worst)

    def span(self, loader: str) -> int:
        """Return the number of lines that a loader has in the matrix."""
        return sum(row.loader == loader for row in self.matrix)

    def version(self, loader: str) -> str | None:
        """Return the version of a loader, None where no verdict tells it."""
        return next((v.loader_version for v in self.run.verdicts if v.loader == loader and v.loader_version), None)


def _law_anchor(of: ProbeRecord | MatrixCell) -> str:
    return "law-" + digest(of.loader, of.format, of.bench, of.variant)


def energy_by_block(record: FileRecord) -> list[tuple[str, float]]:
    """Return (block, energy) pairs, without the blocks that the base lacks; older records have one number a module."""
    energies = record.energies or {name: ModuleEnergy(norm=value) for name, value in (record.energy or {}).items()}
    return [(block.name, block.energy) for block in by_block(energies) if block.energy is not None]


def _anchors(verdicts: Sequence[Verdict]) -> dict[int, str]:
    """Ids that stay the same from run to run, so that a link into last night's report works in tonight's."""
    found: dict[int, str] = {}
    seen: dict[str, int] = {}
    for v in verdicts:
        name = "v-" + digest(v.loader, v.check, v.format, v.bench, v.variant, v.code)
        seen[name] = seen.get(name, 0) + 1
        found[id(v)] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return found


def _spread(record: ProbeRecord) -> float:
    return max((_off(point) for point in record.points), default=0.0)


def _off(point: ProbePoint) -> float:
    if point.expected == 0:
        return 64.0 if point.measured else 0.0
    return distance(point.measured / point.expected)


def _plot(record: ProbeRecord, *, drawn: bool) -> LawPlot:
    points = tuple(sorted(record.points, key=_off, reverse=True))
    figure = law_figure(record) if drawn and points and available() else None
    return LawPlot(record, figure, points[:_MOST_POINTS], max(len(points) - _MOST_POINTS, 0))


def told_lines(verdict: Verdict) -> list[tuple[str, str]]:
    """Return the lines of `Verdict.text()` split into (label as printed, value); the first is the headline."""
    head, *rest = verdict.text().split("\n")
    width = max((len(label) for label, _ in verdict.rows), default=0) + 4
    return [("", head), *((line[:width], line[width:]) for line in rest)]
