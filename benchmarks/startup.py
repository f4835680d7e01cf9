"""How long the commands that need no model take to start, beside `import torch` and a bare interpreter."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.tools import judged, table

ROOT = Path(__file__).parents[1]
LORA = ROOT / "fixtures" / "loras" / "r8_a16" / "kohya.safetensors"
WORK = {
    "bare interpreter": ["-c", "pass"],
    "`lora-harness --help`": ["-m", "harness", "--help"],
    "`lora-harness explain LH201`": ["-m", "harness", "explain", "LH201"],
    "`lora-harness inspect FILE`": ["-m", "harness", "inspect", str(LORA)],
    "`lora-harness audit --help`": ["-m", "harness", "audit", "--help"],
    "`lora-harness audit FILE`": ["-m", "harness", "audit", str(LORA), "-j", "0"],
    "`import torch`": ["-c", "import torch"],
}
MOST_SECONDS = 0.5


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Return the wall and processor time of one start."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    measured = {name: [seconds(arguments) for _ in range(5)] for name, arguments in WORK.items()}
    torch = median(processor for _, processor in measured["`import torch`"])
    rows = []
    for name, times in measured.items():
        wall, processor = (median(each) for each in zip(*times, strict=True))
        shown = f"{processor:.2f}"
        if "lora-harness" in name:
            shown = judged(shown, met=processor <= MOST_SECONDS)
        rows.append([name, f"{wall:.2f}", shown, f"{processor / torch:.2f}"])
    head = ["work", "wall, s", "processor, s", "of `import torch`"]
    return ["## Start-up", "", f"Aim: {MOST_SECONDS:g} s. Median of 5.", "", *table(head, rows)]
