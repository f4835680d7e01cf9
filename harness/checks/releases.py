"""The law of a loader in each of its releases: one process a release, all cells in it; and which release changed it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness.benches import get_bench
from harness.checks.apart import SILENCE, budget, served
from harness.checks.cell import Cell, cells_of
from harness.checks.law import MeasuredLaw, law_of
from harness.checks.symptoms import unloaded
from harness.checks.unloaded import base_weights
from harness.errors import UserError
from harness.isolation.jobs import Channel, JobEnd, run_jobs
from harness.isolation.limits import Limits
from harness.isolation.subject import Apart, SubjectLostError
from harness.law.probe import Probe
from harness.law.released import KILLED, NO_LAW, NO_MODEL, NOT_JUDGED, NOTHING, RAISES, SLOW, SOME
from harness.loaders.declaration import declaration_of
from harness.loaders.live import LiveLoader
from harness.loaders.protocol import IMPLIED_BENCHES, Subject

Place = tuple[str, str]
"""Format and bench."""
_SECONDS = 120.0  # for a call, where nobody says: what is imported on the way belongs to it


@dataclass(frozen=True)
class CellLaw:
    """What one release does in one cell: its law, or why there is none; `state` is what releases are compared by.

    `what` is what it raises: on every file, or only on some, which the state says.
    """

    format: str
    bench: str
    state: str
    code: str | None = None
    trait: str | None = None
    right: bool = False
    what: str = ""
    probes: int = 0
    seconds: float = 0.0

    @property
    def why(self) -> str:
        """What it raises, where the state does not say it all."""
        return "" if self.state == NO_MODEL else self.what

    @property
    def place(self) -> str:
        """`format/bench`."""
        return f"{self.format}/{self.bench}"


@dataclass(frozen=True)
class ReleaseLaw:
    """One release: its cells, or, where its code could not be started at all, the `problem`.

    `start` are the seconds until it had imported what it needs, `seconds` all of them, `cpu` those of a processor.
    """

    loader: str
    version: str
    cells: tuple[CellLaw, ...] = ()
    problem: str = ""
    day: str | None = None
    start: float = 0.0
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def states(self) -> dict[str, str]:
        """The state of each cell by its place."""
        return {cell.place: cell.state for cell in self.cells}

    @property
    def outcome(self) -> tuple[object, ...]:
        """What two releases are compared by: their states, and whether they could be measured at all."""
        return bool(self.problem), self.states


@dataclass(frozen=True)
class ReleaseChange:
    """A cell in which a release does something else than the last one before it that was measured."""

    place: str
    last: str
    first: str
    before: str
    after: str

    @property
    def text(self) -> str:
        """The change in one line."""
        return f"{self.place}: {self.before} up to {self.last}, {self.after} from {self.first}"


def changes(releases: Iterable[ReleaseLaw]) -> list[ReleaseChange]:
    """Return where releases, the oldest first, do something else than the last before them that could be measured."""
    last: dict[str, tuple[str, str]] = {}
    found = []
    for release in releases:
        for place, state in release.states.items():
            if state in NOT_JUDGED:
                continue
            if place in last and last[place][1] != state:
                found.append(ReleaseChange(place, last[place][0], release.version, last[place][1], state))
            last[place] = release.version, state
    return found


def places_of(live: LiveLoader, formats: Sequence[str] = (), benches: Sequence[str] = ()) -> list[Place]:
    """Return the places to measure a loader in, plain LoRA: those asked for, else all that it declares.

    Raises:
        UserError: an unknown format or bench, or none that the loader declares.
    """
    cells, skipped = cells_of(
        Subject(live.name, live.load, declaration=declaration_of(live.load)),
        formats or None,
        benches or None,
        ("lora",),
    )
    if not cells:
        raise UserError(f"{live.name}: {skipped[0].reason}; nothing to measure")
    return [(cell.format, cell.bench_name) for cell in cells if cell.bench_name not in IMPLIED_BENCHES]


def bisected(versions: Sequence[str], measure: Callable[[str], ReleaseLaw]) -> list[ReleaseLaw]:
    """Measure the first and the last of `versions`, and, wherever two measured ones differ, the one half-way between.

    Return what was measured, oldest first. What changes and changes back between two that agree is not seen.
    """
    measured = {index: measure(versions[index]) for index in sorted({0, len(versions) - 1})}

    def look_between(low: int, high: int) -> None:
        if high - low > 1 and measured[low].outcome != measured[high].outcome:
            middle = (low + high) // 2
            measured[middle] = measure(versions[middle])
            look_between(low, middle)
            look_between(middle, high)

    look_between(0, len(versions) - 1)
    return [measured[index] for index in sorted(measured)]


def measure_releases(
    subjects: Mapping[str, Subject],
    places: Sequence[Place],
    *,
    limits: Limits = Limits(workers=1),
    on_release: Callable[[ReleaseLaw], object] = lambda release: None,
) -> list[ReleaseLaw]:
    """Return what each release, given by its version, does in each place (format, bench).

    A release that cannot be started, or whose process dies, costs its own row alone. `on_release` hears of each as soon
    as it is measured.
    """
    rows = [_Row(version, subject) for version, subject in subjects.items()]
    for _, bench in places:  # built once, in the process that all others are forked from
        base_weights(get_bench(bench), "float32")

    def take(index: int, event: dict[str, Any]) -> None:
        if rows[index].take(event):
            on_release(rows[index].release)

    limits = replace(limits, seconds=limits.seconds or _SECONDS)
    jobs = [_job(row.subject, places, limits) for row in rows]
    longest = max((len(places) * budget(Cell(row.subject, *places[0]), limits) for row in rows), default=None)
    ends = run_jobs(jobs, workers=limits.workers, silence=SILENCE, budget=longest, on_event=take)
    for row, end in zip(rows, ends, strict=True):
        if not row.over:
            row.died(end, places)
            on_release(row.release)
    return [row.release for row in rows]


@dataclass
class _Row:
    """A release as it is being measured."""

    version: str
    subject: Subject
    began: float = 0.0
    release: ReleaseLaw = field(init=False)
    over: bool = False

    def __post_init__(self) -> None:
        self.release = ReleaseLaw(self.subject.spec, self.version)

    def take(self, event: dict[str, Any]) -> bool:
        """Take what the job says; return whether it is done."""
        if "cell" in event:
            self.release = replace(self.release, cells=(*self.release.cells, CellLaw(**event["cell"])))
        else:
            self.release = replace(self.release, **event)
        self.over = "seconds" in event
        return self.over

    def died(self, end: JobEnd, places: Sequence[Place]) -> None:
        """Say how it ended: for cells that it did not come to, nothing is known."""
        missing = len(places) - len(self.release.cells)
        problem = f"{end.what} ({missing} of {len(places)} cells not measured)"
        self.release = replace(self.release, problem=problem, seconds=round(end.seconds, 1))


def _job(subject: Subject, places: Sequence[Place], limits: Limits) -> Callable[[Channel], None]:
    """Return the job that measures one release, all its places in one process."""

    def job(channel: Channel) -> None:
        began, used = time.monotonic(), sum(os.times()[:4])
        with served(Cell(subject, *places[0]), channel, limits, [bench for _, bench in places]) as own:
            problem = _begun(own)
            channel.send({"start": round(time.monotonic() - began, 1), "problem": problem})
            for form, bench in places if not problem else ():
                channel.send({"cell": asdict(_measured(replace(own, format=form, bench_name=bench)))})
        cpu = sum(os.times()[:4]) - used  # of its children too, which have ended
        channel.send({"seconds": round(time.monotonic() - began, 1), "cpu": round(cpu, 1)})

    return job


def _begun(cell: Cell) -> str:
    """Start the process of the release; return why it cannot be started, or nothing."""
    try:
        if isinstance(cell.asked, Apart):
            with cell.watch("starting it", None):
                cell.asked.begin()
    except SubjectLostError as lost:
        return f"cannot be started: {lost.what}"
    return ""


def _measured(cell: Cell) -> CellLaw:
    """Return what the release does in a cell; what it does not claim or raises on is said."""
    began = time.monotonic()
    try:
        law = _state(cell, law_of(replace(cell, earlier=[], heard={})))
    except UserError as error:  # of the bench: it cannot be built
        law = CellLaw(cell.format, cell.bench_name, RAISES, what=str(error))
    return replace(law, seconds=round(time.monotonic() - began, 1))


def unloads(probes: Sequence[Probe]) -> bool:
    """Whether no module that was probed has changed at all."""
    return bool(probes) and unloaded(probes) == {probe.module for probe in probes}


def _state(cell: Cell, law: MeasuredLaw) -> CellLaw:
    found = CellLaw(cell.format, cell.bench_name, NO_LAW, law.diagnosis.code, probes=len(law.probes))
    found = replace(found, trait=str(law.diagnosis.trait) if law.diagnosis.trait else None)
    what = law.raised[0] if law.raised else ""
    if what.startswith("bench "):
        return replace(found, state=NO_MODEL, what=what)
    if law.late:
        return replace(found, state=SLOW, what=what)
    if law.killed:
        return replace(found, state=KILLED, code=None, what=what)
    if not law.probes:
        return replace(found, state=RAISES, what=law.raised[0] if law.raised else "no answer")
    some, what = (SOME, law.raised[0]) if law.raised else ("", "")
    if unloads(law.probes):
        return replace(found, state=NOTHING + some, what=what)
    right = law.formula is not None and law.diagnosis.code is None
    return replace(found, state=(law.formula or NO_LAW) + some, right=right, what=what)
