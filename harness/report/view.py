"""What the report's template shows: every decision made here, every escape made there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from harness.report.known import known_groups
from harness.report.links import site
from harness.report.matrix import as_trained, columns, lines
from harness.report.models import ProbePoint, ProbeRecord
from harness.report.records import VIOLATIONS, Run
from harness.report.summary import OUTCOMES, MatrixCell, badness, causes, cells, digest, distance
from harness.report.svg import available, law_figure
from harness.verdict.blocks import by_block
from harness.verdict.file_record import FileRecord, ModuleEnergy
from harness.verdict.verdict import Verdict

_MOST_FIGURES = 12
_MOST_TOLD = 200
_MOST_TOLD_PER_CAUSE = 25
_MOST_ENERGIES = 24
_MOST_BLOCKS = 120
_OFF = 0.01  # a scale 1 % off is a failure
STATUS_WORDS = {"passed": "passed", "failed": "failed", "incomplete": "incomplete", "cut": "cut short"}
STATUS_LOOKS = {"passed": "passed", "failed": "failed", "incomplete": "skipped", "cut": "errored"}
_LISTS = {**dict.fromkeys(VIOLATIONS, "failures"), "xfailed": "known", "skipped": "unmeasured", "passed": "checks"}


@dataclass(frozen=True)
class LawPlot:
    """A law that was not trained with: the figure of its worst cell (None when there are too many), and the others."""

    record: ProbeRecord
    figure: Markup | None
    others: tuple[ProbeRecord, ...] = ()

    @property
    def anchor(self) -> str:
        """The plot's stable id inside a report."""
        return _law_anchor(self.record)

    @property
    def also(self) -> list[str]:
        """The other places in which it was measured."""
        return [" ".join(part for part in (o.format, "on", o.bench) if part) for o in self.others]


class ReportView:
    """The parts of a report that are computed from the verdicts and probes of one run.

    `cells` are the measured cells by loader, format, bench and variant, `benches` and `matrix` the columns and lines
    they make; `causes` the new failures folded by cause, worst first, `known` the expected ones by finding; `counts`
    the outcomes that occurred with their numbers; `loose` the verdicts that belong to no format (images, files, smoke
    checks); `plots` the laws that are not those of the training; `energies` the energy by block of the first files
    that carry one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cells = cells(run)
        self.benches, self.matrix = columns(self.cells), lines(self.cells)
        self.causes, self.known = causes(run.verdicts), known_groups(run.verdicts)
        self.counts = [(outcome, run.counts[outcome]) for outcome in OUTCOMES if run.counts.get(outcome)]
        self.loose = [verdict for verdict in run.verdicts if verdict.format is None]
        self.plots = law_plots(run.of(ProbeRecord))
        found = ((record, energy_by_block(record)[:_MOST_BLOCKS]) for record in run.of(FileRecord))
        self.energies = [(record, blocks) for record, blocks in found if blocks][:_MOST_ENERGIES]
        self._anchors = _anchors(run.verdicts)
        self._cells = {id(verdict): cell.anchor for cell in self.cells.values() for verdict in cell.verdicts}
        self._plotted = {_law_anchor(o): plot.anchor for plot in self.plots for o in (plot.record, *plot.others)}

    @property
    def measured(self) -> list[MatrixCell]:
        """The cells in which something was measured."""
        return [cell for line in self.matrix for cell in line.cells]

    @property
    def site(self) -> str | None:
        """The address of the site that codes and findings link to."""
        return site()

    @property
    def outcomes(self) -> set[str]:
        """The outcomes of the cells of the matrix."""
        return {cell.outcome for cell in self.measured}

    @property
    def known_cells(self) -> int:
        """The number of places in which a known failure was seen."""
        return len({place for group in self.known for place in group.cells})

    @cached_property
    def told(self) -> set[int]:
        """The violations whose text is shown in full; the page stays small, the records hold the rest."""
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
        return self._plotted.get(_law_anchor(cell))

    def evidence(self, cell: MatrixCell) -> str:
        """Return the id that a cell of the matrix links to: its worst failure, or its checks."""
        return cell.anchor if cell.worst is None or cell.worst.ok else self.anchor(cell.worst)

    def cell_anchor(self, verdict: Verdict) -> str:
        """Return the id of the cell that a verdict belongs to, else of the checks without one."""
        return self._cells.get(id(verdict), "loose")

    def list_of(self, outcome: str) -> str:
        """Return the id of the list that shows the verdicts of an outcome."""
        return _LISTS[outcome]

    def version(self, loader: str) -> str | None:
        """Return the version of a loader, None where no verdict tells it."""
        return next((v.loader_version for v in self.run.verdicts if v.loader == loader and v.loader_version), None)

    def pictures(self, loader: str) -> Verdict | None:
        """Return the worst verdict on the pictures of a loader."""
        found = (v for v in self.run.verdicts if v.loader == loader and v.check == "images" and v.outcome != "skipped")
        return min(found, key=badness, default=None)


def grouped(verdicts: Iterable[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Return the verdicts to be told one by one, the worst first, and those that passed."""
    ordered = sorted(verdicts, key=badness)
    return [v for v in ordered if v.outcome != "passed"], [v for v in ordered if v.outcome == "passed"]


def law_plots(records: Iterable[ProbeRecord]) -> list[LawPlot]:
    """Return one plot per loader, law and variant that is not as trained, the worst first."""
    odd = [record for record in records if not as_trained(record.law) and any(map(_off, record.points))]
    folded: dict[tuple[str, str | None, str], list[ProbeRecord]] = {}
    for record in sorted(odd, key=lambda record: -_spread(record)):
        key = record.loader, record.law.formula if record.law else record.format, record.variant
        folded.setdefault(key, []).append(record)
    groups = list(folded.values())
    return [LawPlot(group[0], _figure(group[0], i), tuple(group[1:])) for i, group in enumerate(groups)]


def _figure(record: ProbeRecord, order: int) -> Markup | None:
    return law_figure(record) if order < _MOST_FIGURES and available() else None


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
    return max((_distance(point) for point in record.points), default=0.0)


def _off(point: ProbePoint) -> bool:
    return not abs(point.measured - point.expected) <= _OFF * abs(point.expected)


def _distance(point: ProbePoint) -> float:
    if point.expected == 0:
        return 64.0 if point.measured else 0.0
    return distance(point.measured / point.expected)


def told_lines(verdict: Verdict) -> list[tuple[str, str]]:
    """Return the lines of `Verdict.text()` split into (label as printed, value); the first is the headline."""
    head, *rest = verdict.text().split("\n")
    width = max((len(label) for label, _ in verdict.rows), default=0) + 4
    return [("", head), *((line[:width], line[width:]) for line in rest)]
