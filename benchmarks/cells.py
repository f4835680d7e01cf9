"""Seconds that a cell takes on every bench that a loader is taken to, as `run --all-benches` checks them.

`python -m benchmarks cells` measures the loader `peft`, which takes any model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tools import judged, table
from harness.checks.cell import Cell, cells_beside, declared_cells
from harness.checks.examine import check_cell
from harness.checks.known import known_failures
from harness.checks.plan import Plan
from harness.loaders.registry import resolve

LOADER, MOST, QUICK_CELLS = "peft", 15.0, 2


@dataclass(frozen=True)
class Taken:
    """What one cell took: seconds of the processor and by the clock, and the files that were loaded."""

    cell: Cell
    processor: float
    clock: float
    verdicts: Sequence[str]


def measure(cell: Cell, plan: Plan) -> Taken:
    began, clock = time.process_time(), time.perf_counter()
    verdicts = [verdict.outcome for verdict in check_cell(cell, plan)]
    return Taken(cell, time.process_time() - began, time.perf_counter() - clock, verdicts)


def cells(name: str) -> list[Cell]:
    """Return the cells of plain LoRA in the first format: those declared, then one on every other bench."""
    subject = resolve(name)
    declared = [c for c in declared_cells(subject) if c.variant_name == "lora" and c.format == subject.formats[0]]
    return [*declared, *cells_beside(subject)]


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    import torch

    torch.set_num_threads(1)
    quick = "--quick" in argv
    plan = Plan(1 if quick else None, known=known_failures("shipped"), share=1 / 20)
    chosen = cells(LOADER)[: QUICK_CELLS if quick else None]
    list(check_cell(chosen[0], Plan(max_examples=1)))  # imports
    found = sorted((measure(cell, plan) for cell in chosen), key=lambda taken: -taken.processor)
    rows = [_row(taken, plan) for taken in found]
    middle, over = statistics.median(t.processor for t in found), [t for t in found if t.processor > MOST]
    whole = sum(taken.processor for taken in found)
    return [
        "## Seconds of a cell",
        "",
        f"Aim: {MOST:.0f} s. Processor time of the loader `{LOADER}` in one cell of every bench, as `run --all-benches`"
        f" checks it: all its files, loads and readings. {len(found)} cells, {whole:.0f} s, {middle:.1f} s "
        f"in the middle; {judged(f'{len(over)} above {MOST:.0f} s', met=not over)}.",
        "",
        *table(["bench", "files", "layers", "processor, s", "verdicts"], rows),
    ]


def _row(taken: Taken, plan: Plan) -> list[str]:
    seconds = f"{taken.processor:.1f}" if taken.processor <= MOST else f"**{taken.processor:.1f}**"
    wrong = sorted({outcome for outcome in taken.verdicts if outcome != "passed"})
    files, layers = plan.loads_in(taken.cell), len(taken.cell.targets)
    return [taken.cell.bench_name, str(files), str(layers), seconds, ", ".join(wrong) or "passed"]
