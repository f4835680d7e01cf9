"""How much of a check is the harness's own: everything in a trial that is neither the loader nor the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tools import judged, table
from harness.checks.cell import Plan, check_cell
from harness.checks.trial import Cell
from harness.loaders.registry import installed, resolve
from harness.variants.variant import Variant

EXAMPLES, QUICK = 20, 10
MOST = 0.5


class Watch:
    """Adds up the processor time spent in some functions."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started
                self.calls += 1

        return call


@contextmanager
def reference() -> Iterator[Watch]:
    """Watch what makes the expected update of every module."""
    watch, updates = Watch(), Variant.updates
    Variant.updates = watch.timed(updates)  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        Variant.updates = updates  # type: ignore[method-assign]


def measure(name: str, examples: int) -> list[str]:
    subject, loader = resolve(name), Watch()
    form, bench = next((cell for cell in subject.cells if name.startswith(cell[0])), subject.cells[0])
    timed = loader.timed(subject.load)

    def load(model: Any, lora: Path, *, strength: float = 1.0) -> Any:
        return timed(model, lora, strength=strength)

    cell = Cell(replace(subject, load=load), form, bench)
    list(check_cell(cell, Plan(max_examples=1)))  # imports, and what is kept of a bench from then on
    loader.seconds, loader.calls = 0.0, 0
    with reference() as right:
        started = time.process_time()
        list(check_cell(cell, Plan(max_examples=examples)))
        total = time.process_time() - started
    own = total - loader.seconds - right.seconds
    each = (f"{1000 * seconds / loader.calls:.1f}" for seconds in (loader.seconds, right.seconds, own))
    return [name, f"{form}, {bench}", str(loader.calls), *each, judged(f"{own / total:.0%}", met=own / total < MOST)]


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    import torch

    torch.set_num_threads(1)
    quick = "--quick" in argv
    names = [each.name for each in installed() if each.available]
    head = ["loader", "cell", "calls", "loader, ms", "reference, ms", "harness, ms", "harness's share"]
    rows = [measure(name, QUICK if quick else EXAMPLES) for name in (names[:2] if quick else names)]
    said = f"{QUICK if quick else EXAMPLES} random examples and the planned ones of one cell, processor time per call"
    return ["## The harness's own share of a check", "", f"Aim: less than {MOST:.0%}. {said}.", "", *table(head, rows)]
