"""Measure a report over 5,000 verdicts and 60 pictures: `python tests/report/bench.py` prints one line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import chromium_browser
from report_samples import FORMATS, IGNORED, TRAINED, cell, probes, run_of, sweep

from harness.report.html import write_report
from harness.report.records import Run

LOADERS, BENCHES = 13, 8
_FILTER = """
const box = document.querySelector('input[name=s]'), started = performance.now();
box.click();
return new Promise((done) => setTimeout(() => requestAnimationFrame(() => done(performance.now() - started)), 85));
"""


def large_run(folder: Path) -> Run:
    """Return a sample run of about 5,000 verdicts, a quarter of its cells wrong, with 60 pictures."""
    records: list[Any] = []
    for loader in range(LOADERS):
        for fmt in FORMATS:
            for bench in range(BENCHES):
                law = IGNORED if loader % 4 == 3 else TRAINED
                records += cell(f"loader-{loader}", fmt, f"bench-{bench}", law=law, wrong=law is IGNORED)
            records.append(probes(f"loader-{loader}", fmt, "bench-0", law))
    records = records[:5000]
    strips = sweep(folder, "loader-3", 4.0, prompts=3)[:7]
    return replace(run_of(*records, *strips), folder=folder)


def measure() -> dict[str, float]:
    """Return bytes of the page, seconds to build it, and seconds to first paint and to filter where Chromium is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = large_run(folder)
        started = time.perf_counter()
        path = write_report([run], folder)
        built = time.perf_counter() - started
        found = {"verdicts": len(run.verdicts), "bytes": path.stat().st_size, "build_s": round(built, 2)}
        return found | _in_browser(path)


def _in_browser(path: Path) -> dict[str, float]:
    if chromium_browser.missing():
        return {}
    browser = chromium_browser.start(path.parent / "profile")
    try:
        browser.get(path.as_uri())
        paint = browser.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
        loaded = browser.execute_script("return performance.timing.loadEventEnd - performance.timing.navigationStart")
        filtered = browser.execute_script(_FILTER)
    finally:
        browser.quit()
    return {"first_paint_s": paint / 1000, "loaded_s": loaded / 1000, "filter_s": filtered / 1000}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()) + "\n")
