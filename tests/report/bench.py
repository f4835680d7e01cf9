"""Measure a report over 5,000 verdicts and 60 pictures: `python tests/report/bench.py` prints one line of JSON."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chromium_browser
from report_samples import FORMATS, IGNORED, TRAINED, cell, full_run, probes, run_of, sweep

from harness.report.html import write_report
from harness.report.records import Run

LOADERS, BENCHES = 13, 8
_PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
_SCREENS = """
return (document.querySelector("section:has(> .fold)").getBoundingClientRect().top + scrollY) / innerHeight;
"""
_DESKTOP = {
    "nodes": "arguments[0](document.querySelectorAll('*').length)",
    "first_paint_s": """
new PerformanceObserver((list) => arguments[0](list.getEntriesByName("first-contentful-paint")[0].startTime / 1000))
  .observe({type: "paint", buffered: true});
""",
    "loaded_s": "arguments[0]((performance.timing.loadEventEnd - performance.timing.navigationStart) / 1000)",
    "filter_s": """
const box = document.querySelector('input[name=s]'), started = performance.now();
box.click();
setTimeout(() => requestAnimationFrame(() => arguments[0]((performance.now() - started) / 1000)), 85);
""",
}


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
    """Return the figures of a run of 5,000 verdicts, and those of a night of the usual size."""
    return _measured("", large_run) | _measured("night_", full_run)


def _measured(prefix: str, make: Callable[[Path], Run]) -> dict[str, float]:
    """Return bytes and seconds to build the page, and where Chromium is what it makes of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make(folder)
        started = time.perf_counter()
        path = write_report([run], folder)
        built = time.perf_counter() - started
        bare = len(re.sub(r"data:image/[^\"]+", "", path.read_text(encoding="utf-8")))
        found = {"verdicts": len(run.verdicts), "bytes": path.stat().st_size, "bytes_without_pictures": bare}
        found |= {"build_s": round(built, 2)} | _in_browser(path)
        return {prefix + key: value for key, value in found.items()}


def _in_browser(path: Path) -> dict[str, float]:
    if chromium_browser.missing():
        return {}
    browser = chromium_browser.start(path.parent / "profile")
    try:
        browser.get(path.as_uri())
        found = {name: browser.execute_async_script(script) for name, script in _DESKTOP.items()}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", _PHONE)
        found["phone_screens_before_the_folds"] = browser.execute_script(_SCREENS)
    finally:
        browser.quit()
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()) + "\n")
