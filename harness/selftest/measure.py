"""Measure the checks: is each broken loader found and named, after how many examples; is a correct one ever blamed?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from hypothesis import Phase, given, seed

from harness.checks.apart import SILENCE, served
from harness.checks.cell import Cell
from harness.checks.examine import check_cell
from harness.checks.family import judge
from harness.checks.plan import Plan, examples_for
from harness.checks.run import died
from harness.checks.search import quiet_settings
from harness.checks.trial import run_trial
from harness.example import Example
from harness.isolation.jobs import Channel, run_jobs
from harness.isolation.limits import Limits
from harness.report.models import PowerRecord
from harness.selftest.cases import Case
from harness.verdict.verdict import Verdict

_SEEDS = (1, 2, 3, 4, 5)


@dataclass
class Result:
    """What the checks said of one case: the verdicts of its cells, and per seed the examples until the first failure.

    `first` holds None for a seed whose random examples showed nothing (a fault of the second load, say).
    """

    case: Case
    verdicts: list[Verdict] = field(default_factory=list)
    first: list[int | None] = field(default_factory=list)

    @property
    def violations(self) -> list[Verdict]:
        """The verdicts that make a run red."""
        return [verdict for verdict in self.verdicts if not verdict.ok]

    @property
    def found(self) -> bool:
        """Whether anything was blamed."""
        return bool(self.violations)

    @property
    def named(self) -> bool:
        """Whether all that was blamed has one of the codes that are right for this fault."""
        fault = self.case.fault
        return self.found and fault is not None and {v.code for v in self.violations} <= set(fault.codes)

    @property
    def right(self) -> bool:
        """Whether the checks did what they must: name a broken loader's fault, leave a correct loader alone."""
        return self.named if self.case.fault else not self.found

    @property
    def median(self) -> float | None:
        """The median number of examples until the first failure, None when most seeds showed none."""
        numbers = [float("inf") if n is None else n for n in self.first]
        middle = median(numbers) if numbers else float("inf")
        return None if middle == float("inf") else float(middle)

    @property
    def examples(self) -> int:
        """How many examples were judged, over all cells."""
        cells = {(v.format, v.bench): v.examples or 0 for v in self.verdicts}
        return sum(cells.values())

    def record(self) -> PowerRecord:
        """Return the line of a run record; of a correct loader `detected` counts the false alarms."""
        fault = self.case.fault
        if fault is None:
            trials, alarms = self.examples, len(self.violations)
            return PowerRecord(subject=self.case.name, trials=trials, detected=alarms, factor=1.0)
        return PowerRecord(
            subject=self.case.name,
            fault=fault.what,
            expected_code=fault.codes[0],
            trials=1,
            detected=int(self.found),
            named=int(self.named),
            examples=self.median,
        )


def measure(
    cases: Sequence[Case],
    *,
    max_examples: int | None = None,
    quick: bool = False,
    right_examples: int | None = None,
    base_seed: int = 0,
    seeds: Sequence[int] = _SEEDS,
    formats: tuple[str, ...] = (),
    benches: tuple[str, ...] = (),
    limits: Limits = Limits(),
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check every case in children of this process and return what was said, in the order of `cases`.

    `max_examples` are drawn per cell from `base_seed`; each of `seeds` starts one more search that ends at the first
    failure. `right_examples` are for each correct loader instead, shared by its cells. `formats` and `benches` are
    those of the correct loaders; a broken one is tried where its fault shows.
    """
    results = [Result(case) for case in cases]
    work = [(result, cell) for result in results for cell in result.case.cells(formats, benches)]
    waiting = Counter(result.case.name for result, _ in work)
    cells = Counter(waiting)

    def plan(case: Case) -> Plan:
        shared = math.ceil(right_examples / cells[case.name]) if right_examples and case.fault is None else None
        return Plan(shared or max_examples, base_seed, quick=quick)

    jobs = [_job(result.case, cell, plan(result.case), seeds, limits) for result, cell in work]

    def take(index: int, event: dict[str, Any]) -> None:
        result = work[index][0]
        if "verdict" in event:
            result.verdicts.append(Verdict.model_validate_json(event["verdict"]))
        else:
            result.first.extend(event["first"])
            waiting[result.case.name] -= 1
            if not waiting[result.case.name]:
                on_result(result)

    ends = run_jobs(jobs, workers=limits.workers, silence=SILENCE, on_event=take)
    for (result, cell), end in zip(work, ends, strict=True):
        if end.trouble:
            raise end.trouble
        if end.status != "done":
            result.verdicts.append(died(cell, end))
            on_result(result)
    return results


def _job(case: Case, cell: Cell, plan: Plan, seeds: Sequence[int], limits: Limits) -> Callable[[Channel], None]:
    seconds = (case.fault.seconds if case.fault else None) or limits.seconds or cell.subject.defaults.seconds

    def job(channel: Channel) -> None:
        with served(cell, channel, replace(limits, seconds=seconds)) as own:
            for verdict in check_cell(own, plan):
                channel.send({"verdict": verdict.model_dump_json()})
            first = [first_failure(own, plan, each) for each in seeds] if case.fault else []
        channel.send({"first": first})

    return job


def first_failure(cell: Cell, plan: Plan, base_seed: int) -> int | None:
    """Return the number of the first random example that shows a fault, or None when the plan's show none."""
    judged: list[bool] = []

    def look(example: Example) -> None:
        if not any(judged):
            judged.append(bool(judge(run_trial(cell, example))))

    run = given(example=examples_for(cell, plan))(look)
    seed(base_seed)(quiet_settings(plan.examples_in(cell), (Phase.generate,))(run))()
    return len(judged) if any(judged) else None
