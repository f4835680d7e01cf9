"""Size, nodes, phone screens and time to first paint of two reports: 5,000 verdicts, and a night of the usual size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] = ()) -> list[str]:
    command = [sys.executable, str(ROOT / "tests" / "report" / "bench.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    rows = [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in found.items()]
    return [
        "## A large report",
        "",
        "Sample data; seconds end in s.",
        "",
        "| what | measured |",
        "| --- | --- |",
        *rows,
    ]


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
