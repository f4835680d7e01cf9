"""How much of the matrix is the harness's own time: everything in it that is neither the loader nor the reference."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.tools import judged, table
from harness.checks.cell import Cell, declared_cells
from harness.checks.examine import check_cell
from harness.checks.known import known_failures
from harness.checks.plan import Plan
from harness.isolation.limits import TimeLimitExceeded
from harness.loaders.protocol import Subject
from harness.loaders.registry import installed, resolve
from harness.measure import effective
from harness.variants.variant import Variant

MOST = 0.45
CI_EXAMPLES, CI_SHARE = 60, 1 / 20  # as `make test` checks the matrix
QUICK_CELLS = 2


class Watch:
    """Adds up the processor time spent in some functions, apart from calls that hung until they were ended."""

    def __init__(self) -> None:
        self.seconds, self.calls, self.hung = 0.0, 0, 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            except TimeLimitExceeded:
                self.hung += time.process_time() - started
                started = time.process_time()
                raise
            finally:
                self.seconds += time.process_time() - started
                self.calls += 1

        return call


@dataclass(frozen=True)
class Spent:
    """Processor seconds of one loader's cells."""

    name: str
    cells: int
    calls: int
    loader: float
    layers: float
    reference: float
    own: float

    @property
    def share(self) -> float:
        """The harness's own part of all."""
        return self.own / (self.loader + self.layers + self.reference + self.own)


@contextmanager
def reference() -> Iterator[Watch]:
    """Watch what makes the expected update of every module."""
    watch, updates = Watch(), Variant.updates
    Variant.updates = watch.timed(updates)  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        Variant.updates = updates  # type: ignore[method-assign]


@contextmanager
def layers(watch: Watch) -> Iterator[None]:
    """Watch what a loader's own layers take to answer; those that are torch's own are not timed."""
    ask = effective.ask
    timed = watch.timed(ask)

    def asked(module: Any, inputs: Any) -> Any:
        own = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
        return (ask if own else timed)(module, inputs)

    effective.ask = asked
    try:
        yield
    finally:
        effective.ask = ask


def watched(subject: Subject, watch: Watch, after: Watch) -> Subject:
    """Return `subject` with its calls timed: loads, and what else it declares `after` them."""
    timed, declared = watch.timed(subject.load), subject.declaration

    def load(model: Any, lora: Path, *, strength: float = 1.0) -> Any:
        return timed(model, lora, strength=strength)

    unload, set_strength = (each and after.timed(each) for each in (declared.unload, declared.set_strength))
    return replace(subject, load=load, declaration=replace(declared, unload=unload, set_strength=set_strength))


def measure(name: str, plan: Plan, most_cells: int | None) -> Spent:
    subject, loader, after = resolve(name), Watch(), Watch()
    cells = [replace(c, subject=watched(subject, loader, after)) for c in declared_cells(subject)][:most_cells]
    _check(cells[0], Plan(max_examples=1))  # imports
    gc.collect()
    gc.freeze()  # as the children do, once all is imported
    loader.seconds, loader.calls, loader.hung, after.seconds = 0.0, 0, 0.0, 0.0
    with reference() as right, layers(after):
        started = time.process_time()
        for cell in cells:
            _check(cell, plan)
        total = time.process_time() - started - loader.hung - after.hung
    own = total - loader.seconds - after.seconds - right.seconds
    return Spent(name, len(cells), loader.calls, loader.seconds, after.seconds, right.seconds, own)


def _check(cell: Cell, plan: Plan) -> None:
    list(check_cell(cell, plan))


def _row(spent: Spent, share: str) -> list[str]:
    parts = (spent.loader, spent.layers, spent.reference, spent.own)
    each = (f"{1000 * part / spent.calls:.1f}" for part in parts)
    return [spent.name, str(spent.cells), str(spent.calls), *each, share]


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    import torch

    torch.set_num_threads(1)
    quick = "--quick" in argv
    names = [each.name for each in installed() if each.available]
    plan = Plan(1 if quick else CI_EXAMPLES, known=known_failures("shipped"), share=CI_SHARE)
    found = [measure(name, plan, QUICK_CELLS if quick else None) for name in names]
    numbers = zip(*((s.cells, s.calls, s.loader, s.layers, s.reference, s.own) for s in found), strict=True)
    whole = Spent("**all**", *map(sum, numbers))
    head = ["loader", "cells", "calls", "loads, ms", "its layers, ms", "reference, ms", "harness, ms", "share"]
    rows = [_row(spent, f"{spent.share:.0%}") for spent in found]
    rows.append(_row(whole, judged(f"{whole.share:.0%}", met=whole.share < MOST)))
    said = f"Aim: less than {MOST:.0%} of the whole matrix. Processor time per call of a loader, "
    said += f"{plan.max_examples} random examples a cell of plain LoRA on the main bench, a twentieth of it elsewhere. "
    said += "The loader is its loads, and the layers that it left: what they answer, its unload and set_strength."
    return ["## The harness's own share of a check", "", said, "", *table(head, rows)]
