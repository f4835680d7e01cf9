"""Check whole loaders: every declared cell in its own child process, verdicts streamed as they come.

A cell is checked by planned probes of the law, a random search and what follows a load; then what is known to fail.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.checks.apart import SILENCE, budget, served
from harness.checks.cell import Cell, cells_of
from harness.checks.examine import Measured, check_cell
from harness.checks.known import KnownFailure, unmatched
from harness.checks.plan import Pins, Plan
from harness.checks.trial_files import sample_file
from harness.isolation.jobs import Channel, JobEnd, run_jobs
from harness.isolation.limits import Limits
from harness.isolation.processes import can_fork
from harness.isolation.subject import Timed
from harness.law.probe import fields_of, probe_from
from harness.loaders.benches import Which
from harness.loaders.registry import resolve
from harness.verdict.verdict import LawRecord, Verdict

__all__ = ["Limits", "Measured", "check_cell", "check_cells", "check_loader", "died"]

_TELL_SECONDS = 0.25
NOT_REACHED = "the run stopped at the first sure answer (-x)"


class _EnoughError(BaseException):
    """The first sure answer is there, and no more were wanted; Hypothesis, which may run here, does not catch it."""


def check_cells(
    cells: Sequence[Cell],
    plan: Plan,
    limits: Limits = Limits(),
    *,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    on_examples: Callable[[Cell, int, float], None] = lambda cell, number, seconds: None,
    on_measured: Callable[[Cell, Measured], None] = lambda cell, measured: None,
    on_sure: Callable[[Verdict], None] | None = None,
    first: bool = False,
    beside: Sequence[Cell] = (),
) -> list[Verdict]:
    """Check `cells`, at most `limits.workers` at a time; a cell whose process died has one errored verdict more.

    `on_examples` hears, a few times a second, how many examples a cell tried since, and how many seconds those took;
    `on_sure`, of each cell whose law is wrong, its verdict as soon as that is sure. With `first` all ends there, or
    with the first cell that has a fault of another kind; what was not reached is skipped. `beside` are cells that were
    judged elsewhere: known failures may speak of them.

    Raises:
        UserError: the pinned example names a module that a bench does not have, or no file can say it; a full disk.
    """
    if plan.pins:
        _try_to_write(plan.pins, cells)
    heard = _Heard(cells, on_verdict, on_cell, on_examples, on_measured, on_sure, first)
    jobs = [_job(cell, plan, limits, early=first or on_sure is not None) for cell in cells]
    longest = max((budget(cell, limits) for cell in cells), default=None)
    workers = limits.workers if can_fork(gpu=any(cell.subject.declaration.gpu for cell in cells)) else 0
    try:
        ends = run_jobs(jobs, workers=workers, silence=SILENCE, budget=longest, on_event=heard.event)
    except _EnoughError:
        heard.not_reached()
        return heard.verdicts
    for cell, end in zip(cells, ends, strict=True):
        if end.trouble:
            raise end.trouble
        if end.status != "done":
            heard.take(died(cell, end))
    for known in unmatched(plan.known, [*cells, *beside]) if plan.pins is None else ():
        heard.take(_stale(known))
    return heard.verdicts


def _try_to_write(pins: Pins, cells: Iterable[Cell]) -> None:
    """Refuse a bad pin as bad usage: in its cell it would look like a loader that raises."""
    for cell in cells:
        with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
            sample_file(cell, pins.example(cell), Path(folder))


@dataclass
class _Heard:
    """What the judges of `cells` say, handed on as it comes; `verdicts` are all that were made."""

    cells: Sequence[Cell]
    on_verdict: Callable[[Verdict], None]
    on_cell: Callable[[Cell], None]
    on_examples: Callable[[Cell, int, float], None]
    on_measured: Callable[[Cell, Measured], None]
    on_sure: Callable[[Verdict], None] | None
    first: bool
    verdicts: list[Verdict] = field(default_factory=list)
    of: defaultdict[int, list[Verdict]] = field(default_factory=lambda: defaultdict(list))

    def take(self, verdict: Verdict) -> None:
        """Keep a verdict and hand it on."""
        self.verdicts.append(verdict)
        self.on_verdict(verdict)

    def event(self, index: int, event: dict[str, Any]) -> None:
        """Take what the judge of the cell `index` sent.

        Raises:
            _EnoughError: it is the first sure answer, and no more were wanted.
        """
        if "verdict" in event:
            self.of[index].append(Verdict.model_validate_json(event["verdict"]))
            self.take(self.of[index][-1])
        elif "sure" in event:
            self._sure(index, Verdict.model_validate_json(event["sure"]))
        elif "probes" in event:
            self.on_measured(self.cells[index], _measured_from(event))
        elif "examples" in event:
            self.on_examples(self.cells[index], event["examples"], event["seconds"])
        else:
            self.on_cell(self.cells[index])
            if self.first and not all(verdict.ok for verdict in self.of[index]):
                raise _EnoughError

    def _sure(self, index: int, verdict: Verdict) -> None:
        if self.on_sure is not None:
            self.on_sure(verdict)
        if self.first:
            self.of[index].append(verdict)
            self.take(verdict)
            raise _EnoughError

    def not_reached(self) -> None:
        """Say of each cell without a verdict that it was not judged."""
        for index, cell in enumerate(self.cells):
            if index not in self.of:
                self.take(cell.verdict("smoke", "skipped", title="not judged", reason=NOT_REACHED))


def check_loader(
    load: Callable[..., object] | str,
    *,
    formats: Iterable[str] | None = None,
    benches: Iterable[Which] | None = None,
    variants: Iterable[str] | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    known_failures: Sequence[KnownFailure] = (),
    limits: Limits = Limits(),
) -> list[Verdict]:
    """Check a loader, given as a function or by the string that names it, and return all verdicts.

    `benches` are names, or functions under `@bench`.
    `max_examples` (default: 200, of a `cmd:` loader 10) are drawn per format, bench and variant, reproducibly from
    `seed`.

    Raises:
        LoaderSpecError: `load` names no loader.
        UserError: an unknown format, bench or variant.
    """
    cells, skipped = cells_of(resolve(load), formats, benches, variants)
    plan = Plan(max_examples=max_examples, seed=seed, known=tuple(known_failures))
    return skipped + check_cells(cells, plan, limits)


def _job(cell: Cell, plan: Plan, limits: Limits, *, early: bool) -> Callable[[Channel], None]:
    def job(channel: Channel) -> None:
        def sure(verdict: Verdict) -> None:
            channel.send({"sure": verdict.model_dump_json()})

        with served(cell, channel, limits) as own:
            own = _telling(own, channel)
            told: dict[str, Any] = {"on_sure": sure} if early else {}
            for verdict in check_cell(own, plan, lambda measured: channel.send(_as_event(measured)), **told):
                channel.send({"verdict": verdict.model_dump_json()})
        channel.send({"done": True})

    return job


def _telling(cell: Cell, channel: Channel) -> Cell:
    """Return the cell, which tells how many examples it has tried."""
    return cell if cell.asked is None else replace(cell, asked=Timed(cell.asked, _Untold(channel)))


@dataclass
class _Untold:
    """Examples that were tried and not told of yet, and their seconds; the first is told at once."""

    channel: Channel
    number: int = 0
    seconds: float = 0.0
    at: float = 0.0

    def __call__(self, seconds: float) -> None:
        self.number, self.seconds, now = self.number + 1, self.seconds + seconds, time.monotonic()
        if now - self.at > _TELL_SECONDS:
            self.channel.send({"examples": self.number, "seconds": self.seconds})
            self.number, self.seconds, self.at = 0, 0.0, now


def _as_event(measured: Measured) -> dict[str, Any]:
    law = measured.law.model_dump() if measured.law else None
    return {"law": law, "probes": [fields_of(probe) for probe in measured.probes], "labels": dict(measured.labels)}


def _measured_from(event: dict[str, Any]) -> Measured:
    law = LawRecord.model_validate(event["law"]) if event["law"] else None
    return Measured(law, tuple(map(probe_from, event["probes"])), event["labels"])


def died(cell: Cell, end: JobEnd) -> Verdict:
    """Return the verdict of a cell whose process ended in another way than by finishing."""
    rows = [("loader", cell.subject.title), ("file", cell.place)]
    rows += [("printed", line) for line in end.output_tail.strip().splitlines()[-3:]]
    rows += [("reproduce", end.last_label)] if end.last_label else []
    fields = {"code": "LH901", "rows": tuple(rows), "reproduce": end.last_label, "seconds": end.seconds}
    return cell.verdict("smoke", "errored", title=f"loader raised: {end.what}", **fields)


def _stale(known: KnownFailure) -> Verdict:
    title = f"known failure {known.id} matches no cell of {known.loader}: remove or correct its line"
    return Verdict(loader=known.loader, check="known_failures", outcome="errored", code=known.code, title=title)
