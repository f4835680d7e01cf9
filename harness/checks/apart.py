"""Cells whose loader runs apart: the process that judges a cell asks another, in which the loader's code runs.

run (prints, records)  <-  judge (one per cell: examples, files, fits, verdicts)  <-  subject (loads, measures)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.benches.given import describe_benches
from harness.checks.cell import Cell
from harness.checks.measuring import answering
from harness.isolation.elsewhere import Elsewhere
from harness.isolation.jobs import Channel, JobEnd, run_jobs
from harness.isolation.limits import Limits, no_limit
from harness.isolation.subject import START_SECONDS, subject_process
from harness.loaders.protocol import Subject

SILENCE = (
    600.0  # seconds without a message in which a judge, which runs no foreign code, does something else than think
)
_CALLS_IN_BUDGET = 90
_TIMES_ITS_LIMIT = 10  # a call may wait for a processor beyond its limit; a judge that hangs ends all the same


def budget(cell: Cell, limits: Limits) -> float:
    """Return the seconds that a whole cell may take: as many as ninety calls that each take all they may."""
    return START_SECONDS + _CALLS_IN_BUDGET * (limits.seconds or cell.allowed)


@contextmanager
def served(cell: Cell, channel: Channel, limits: Limits, more: Iterable[str] = ()) -> Iterator[Cell]:
    """Give the block the cell with its loader in a process of its own, unless the run has none either.

    That process can be asked for `more` benches too.
    """

    def watch(label: str, seconds: float | None = None) -> AbstractContextManager[None]:
        return channel.call(label, START_SECONDS + _TIMES_ITS_LIMIT * (seconds or 0.0))

    subject, gpu = cell.subject, cell.subject.declaration.gpu
    with (
        closing(subject),
        tempfile.TemporaryDirectory(prefix="lora-harness-") as folder,
        closing(subject),
        subject_process(
            answering(subject),
            prepare=subject.prepare,
            is_over=subject.is_over,
            apart=channel.apart,
            memory_limit=None if gpu else limits.memory,  # drivers reserve addresses for all there is
            elsewhere=_there(subject, (cell.bench_name, *more), Path(folder)),
            gpu=gpu,
        ) as asked,
    ):
        seconds = cell.seconds or limits.seconds
        yield replace(cell, asked=asked, watch=watch if channel.apart else no_limit, seconds=seconds)


def _there(subject: Subject, benches: Iterable[str], folder: Path) -> Elsewhere | None:
    """Return where the subject's code runs, told of the benches whose weights lie in `folder`; None for here."""
    if subject.elsewhere is None:
        return None
    told = subject.elsewhere.told
    return replace(subject.elsewhere, told={**told, "benches": describe_benches(benches, folder, plain=told["plain"])})


def done_apart(
    cell: Cell, work: Callable[[Cell], Any], limits: Limits = Limits(), *, workers: int = 1
) -> tuple[Any, JobEnd]:
    """Return what `work(cell)` returns, JSON, done where the cell is judged; None when that ended before.

    Raises:
        UserError: a full disk.
    """
    results: list[Any] = []

    def job(channel: Channel) -> None:
        with served(cell, channel, limits) as own:
            channel.send(work(own))

    (end,) = run_jobs(
        [job],
        workers=workers,
        silence=SILENCE,
        budget=budget(cell, limits),
        on_event=lambda index, result: results.append(result),
    )
    if end.trouble:
        raise end.trouble
    return (results[0] if results else None), end
