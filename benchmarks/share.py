"""How much of a check is the harness's own: everything in a trial that is not the loader under test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.checks.cell import Plan, check_cell
from harness.checks.trial import Cell
from harness.loaders.registry import installed, resolve

EXAMPLES = 60


class Timed:
    """The subject's load, with the time spent in it added up."""

    def __init__(self, load: Any) -> None:
        self.load, self.seconds, self.calls = load, 0.0, 0

    def __call__(self, model: Any, lora: Path, *, strength: float = 1.0) -> Any:
        started = time.perf_counter()
        try:
            return self.load(model, lora, strength=strength)
        finally:
            self.seconds += time.perf_counter() - started
            self.calls += 1


def measure(name: str) -> str:
    subject = resolve(name)
    form, bench = next((cell for cell in subject.cells if name.startswith(cell[0])), subject.cells[0])
    timed = Timed(subject.load)
    cell = Cell(replace(subject, load=timed), form, bench)
    started = time.perf_counter()
    list(check_cell(cell, Plan(max_examples=EXAMPLES)))
    total = time.perf_counter() - started
    own = total - timed.seconds
    per_call = 1000 / timed.calls
    each = f"{timed.seconds * per_call:.1f} ms | {own * per_call:.1f} ms | {own / total:.0%}"
    return f"| {name} | {form} | {timed.calls} | {each} |"


def main(argv: Sequence[str] = ()) -> list[str]:
    import torch

    torch.set_num_threads(1)
    head = [
        "## The harness's own share of a check",
        "",
        f"{EXAMPLES} random examples and the planned ones, one cell.",
        "",
    ]
    table = [
        "| loader | format | calls | loader per call | harness per call | harness's share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return [*head, *table, *(measure(each.name) for each in installed() if each.available)]
