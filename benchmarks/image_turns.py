"""Do fewer pictures err more often? A sweep in turns against one with all pictures, on the same draws.

    python -m benchmarks.image_turns [--only r8_a16 strong_r8_a32] [--draws 25]

Candidates, weights and ladder are those of image_power.py, on the shipped base pipeline. In turns: one denoiser call
for each of eight prompts and seeds, four pictures, and all eight only where the two do not agree
(`harness.images.sequential.agree`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.image_power import BACKENDS, FACTORS, RUNGS, Cell, Subjects, _effect, _look, pairs_of
from harness.images import base_pipeline, metrics, open_pipeline
from harness.images.factor import compare, read
from harness.images.sequential import FIRST, agree
from harness.images.verdict import Judgement, StrengthResult, judge

PICTURES = 8
HEADING = "## In turns"


class Shown:
    """What one factor looks like, in pictures or by one call, for any choice of prompts and seeds."""

    def __init__(self, subjects: Subjects, ladder: Mapping[float, Tensor], trained: Tensor) -> None:
        self.subjects, self.ladder, self.trained = subjects, ladder, trained
        self.effect = _effect(ladder[0.0], trained, subjects.quick)

    def at(self, factor: float, backend: str, own: Tensor) -> None:
        images = self.subjects.draw(factor, backend)
        self.sums, self.own = compare(images, self.ladder), own
        self.measured = None if self.subjects.quick else metrics.measure(images, self.ladder[0.0], self.trained)

    def judged(self, rows: Tensor) -> Judgement:
        look = "clean" if self.measured is None else _look(self.measured, rows)
        means = float(self.effect[rows].mean()), float(self.own[rows].mean())
        return judge([StrengthResult(1.0, read(self.sums.of(rows), draws=100), *means, look)])  # type: ignore[arg-type]


def measure(lora: Path, draws: int, cells: dict[tuple[str, float, str], Cell], pictures: list[int]) -> None:
    """Add the verdicts in turns and with all pictures, and how many pictures the former took."""
    base = base_pipeline()
    opened, half = (open_pipeline(base, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    pairs = pairs_of(base, 2 * PICTURES, 1000)
    both = []
    for quick in (True, False):
        subjects = Subjects(opened, half, lora, pairs, quick)
        ladder = {rung: subjects.draw(rung, "float32") for rung in RUNGS}
        both.append(Shown(subjects, ladder, subjects.draw(1.0, "float32")))
    generator = torch.Generator().manual_seed(0)
    for backend in BACKENDS:
        own = [_effect(s.ladder[0.0], s.subjects.draw(0.0, backend), s.subjects.quick) for s in both]
        for factor in FACTORS:
            for shown, each in zip(both, own, strict=True):
                shown.at(factor, backend, each)
            for _ in range(draws):
                rows = torch.randperm(2 * PICTURES, generator=generator)[:PICTURES]
                probe, whole = (shown.judged(rows) for shown in both)
                few = both[1].judged(rows[:FIRST])
                sure = agree(probe, few)
                pictures.append(FIRST if sure else FIRST + PICTURES)
                for way, found in (("in turns", few if sure else whole), ("all", whole)):
                    cells.setdefault((backend, factor, way), Cell()).findings.append(found)


def table(cells: Mapping[tuple[str, float, str], Cell]) -> list[str]:
    """Return the share of draws called wrong, in brackets those called inconclusive."""
    head = ["weights", "way", *(f"{factor:g}x" for factor in FACTORS)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for backend in BACKENDS:
        for way in ("all", "in turns"):
            found = (cells[backend, factor, way] for factor in FACTORS)
            shares = (
                (c.share(lambda f: f.code is not None), c.share(lambda f: f.finding == "inconclusive")) for c in found
            )
            row = [f"{wrong:.2f}" + (f" ({unsure:.2f})" if unsure > 0.004 else "") for wrong, unsure in shares]
            lines.append(f"| {backend} | {way} | {' | '.join(row)} |")
    return lines


def section(only: Sequence[str] = ("r8_a16", "strong_r8_a32"), draws: int = 25) -> str:
    """Measure, and return the section of the document."""
    began, cells, pictures = time.perf_counter(), dict[tuple[str, float, str], Cell](), list[int]()
    for name in only:
        measure(Path("fixtures/loras") / name / "peft", draws, cells, pictures)
    lines = [
        HEADING,
        "",
        "`benchmarks/image_turns.py`: one denoiser call for each of eight prompts and seeds, then four pictures, and "
        "all eight where the two do not agree, against all eight pictures on the same draws. On the first base (the "
        f"second is not kept), {len(only)} LoRAs ({', '.join(only)}), {draws} draws of 16 prompts per cell and LoRA, "
        f"so n = {draws * len(only)} per entry, not independent. On average "
        f"{sum(pictures) / len(pictures):.1f} pictures instead of 8; {time.perf_counter() - began:.0f} s.",
        "",
        *table(cells),
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the section alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["r8_a16", "strong_r8_a32"])
    parser.add_argument("--draws", type=int, default=25)
    options = parser.parse_args()
    print(section(options.only, options.draws))


if __name__ == "__main__":
    main()
