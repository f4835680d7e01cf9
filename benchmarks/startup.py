"""How long the commands that need no model take to start, beside `import torch` and a bare interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
LORA = ROOT / "fixtures" / "loras" / "r8_a16" / "kohya.safetensors"
WORK = {
    "bare interpreter": ["-c", "pass"],
    "`lora-harness --help`": ["-m", "harness", "--help"],
    "`lora-harness inspect FILE`": ["-m", "harness", "inspect", str(LORA)],
    "`lora-harness explain LH201`": ["-m", "harness", "explain", "LH201"],
    "`import torch`": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def main(argv: Sequence[str] = ()) -> list[str]:
    measured = {name: median(seconds(arguments) for _ in range(5)) for name, arguments in WORK.items()}
    torch = measured["`import torch`"]
    rows = [f"| {name} | {value:.2f} s | {value / torch:.2f} |" for name, value in measured.items()]
    head = [
        "## Start-up",
        "",
        "Median of 5; the limit is 0.5 s.",
        "",
        "| work | time | of `import torch` |",
        "| --- | --- | --- |",
    ]
    return head + rows
