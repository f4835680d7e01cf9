"""Bytes, nodes, phone screens and time to first paint of the pages of a night, a large run and two audits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
AIMS: Mapping[str, Mapping[str, float]] = {
    "night": {
        "bytes_without_pictures": 1_000_000,
        "nodes": 10_000,
        "first_paint_s": 0.2,
        "phone_screens_before_the_folds": 6,
    },
    "audit of 5,000 files": {"bytes": 500_000},
}


def main(argv: Sequence[str] = ()) -> list[str]:
    command = [sys.executable, str(ROOT / "tests" / "report" / "bench.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pages: dict[str, dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    figures = list(dict.fromkeys(figure for page in pages.values() for figure in page))
    return [
        "## Pages",
        "",
        "Sample data in a headless Chromium without a network, the quickest of five loads; seconds end in s.",
        "",
        f"| what | {' | '.join(pages)} |",
        f"| --- |{' --- |' * len(pages)}",
        *(_row(figure, pages) for figure in figures),
    ]


def _row(figure: str, pages: Mapping[str, Mapping[str, float]]) -> str:
    return f"| {figure.replace('_', ' ')} | {' | '.join(_cell(name, page, figure) for name, page in pages.items())} |"


def _cell(name: str, page: Mapping[str, float], figure: str) -> str:
    if figure not in page:
        return ""
    value, aim = page[figure], AIMS.get(name, {}).get(figure)
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    if aim is None:
        return shown
    return f"{shown} (met)" if value <= aim else f"{shown}, aim {aim:,g} (**missed**)"
