"""Check whole loaders: every declared cell in its own child process, verdicts streamed as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from harness.checks.cell import Cell, cells_of
from harness.checks.known import KnownFailure, unmatched
from harness.checks.plan import Plan
from harness.checks.run_cell import Measured, check_cell
from harness.isolation.jobs import Channel, JobEnd, run_jobs
from harness.isolation.limits import Limits, call_limit
from harness.loaders.registry import resolve
from harness.verdict.verdict import Verdict

__all__ = ["Limits", "as_list", "check_cells", "check_loader", "died"]


def check_cells(
    cells: Sequence[Cell],
    plan: Plan,
    limits: Limits = Limits(),
    *,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    on_measured: Callable[[Cell, Measured], None] = lambda cell, measured: None,
) -> list[Verdict]:
    """Check `cells`, at most `limits.workers` at a time; a cell whose process died has one errored verdict more.

    Raises:
        UserError: the pinned example names a module that a bench does not have.
    """
    for cell in cells:
        _ = plan.pins and plan.pins.example(cell)  # a bad pin is bad usage, not a loader that raises
    verdicts: list[Verdict] = []

    def take(verdict: Verdict) -> None:
        verdicts.append(verdict)
        on_verdict(verdict)

    def on_event(index: int, event: object) -> None:
        if isinstance(event, Verdict):
            take(event)
        elif isinstance(event, Measured):
            on_measured(cells[index], event)
        else:
            on_cell(cells[index])

    jobs = [_job(cell, plan, limits) for cell in cells]
    ends = run_jobs(jobs, workers=limits.workers, memory_limit=limits.memory, on_event=on_event)
    for cell, end in zip(cells, ends, strict=True):
        if end.status != "done":
            take(died(cell, end))
    for known in unmatched(plan.known, cells) if plan.pins is None else ():
        take(_stale(known))
    return verdicts


def check_loader(
    load: Callable[..., object] | str,
    *,
    formats: Iterable[str] | None = None,
    benches: Iterable[str] | None = None,
    variants: Iterable[str] | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    known_failures: Sequence[KnownFailure] = (),
    limits: Limits = Limits(),
) -> list[Verdict]:
    """Check a loader, given as a function or by the string that names it, and return all verdicts.

    `max_examples` (default: 200, of a `cmd:` loader 10) are drawn per format, bench and variant, reproducibly from
    `seed`.

    Raises:
        LoaderSpecError: `load` names no loader.
        UserError: an unknown format, bench or variant.
    """
    cells, skipped = cells_of(resolve(load), as_list(formats), as_list(benches), as_list(variants))
    plan = Plan(max_examples=max_examples, seed=seed, known=tuple(known_failures))
    return skipped + check_cells(cells, plan, limits)


def _job(cell: Cell, plan: Plan, limits: Limits) -> Callable[[Channel], None]:
    def job(channel: Channel) -> None:
        guarded = replace(cell, limit=call_limit(channel, limits.seconds or cell.subject.defaults.seconds))
        for verdict in check_cell(guarded, plan, channel.send):
            channel.send(verdict)
        channel.send("done")

    return job


def died(cell: Cell, end: JobEnd) -> Verdict:
    """Return the verdict of a cell whose process ended in another way than by finishing."""
    rows = [("loader", cell.subject.spec), ("file", cell.place)]
    rows += [("printed", line) for line in end.output_tail.strip().splitlines()[-3:]]
    rows += [("reproduce", end.last_label)] if end.last_label else []
    fields = {"code": "LH901", "rows": tuple(rows), "reproduce": end.last_label, "seconds": end.seconds}
    return cell.verdict("smoke", "errored", title=f"loader raised: {end.what}", **fields)


def _stale(known: KnownFailure) -> Verdict:
    title = f"known failure {known.id} matches no cell of {known.loader}: remove or correct its line"
    return Verdict(loader=known.loader, check="known_failures", outcome="errored", code=known.code, title=title)


def as_list(names: Iterable[str] | None) -> list[str] | None:
    """Return `names` as a list; None, which stands for all, stays None."""
    return None if names is None else list(names)
