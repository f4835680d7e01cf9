"""Measure the pages of runs and audits: `python tests/report/bench.py` prints one line of JSON."""

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
from library_samples import library_of
from report_samples import FORMATS, IGNORED, TRAINED, cell, full_run, probes, run_of, sweep

from harness.report.audit_page import audit_page
from harness.report.html import write_report
from harness.report.records import Run

LOADERS, BENCHES = 13, 8
_LOADS = 5
_PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
_SCREENS = """
const folds = document.querySelector("section:has(> .fold)");
return folds && (folds.getBoundingClientRect().top + scrollY) / innerHeight;
"""
_DESKTOP = {
    "nodes": "arguments[0](document.querySelectorAll('*').length)",
    "first_paint_s": """
new PerformanceObserver((list) => arguments[0](list.getEntriesByName("first-contentful-paint")[0].startTime / 1000))
  .observe({type: "paint", buffered: true});
""",
    "loaded_s": "arguments[0]((performance.timing.loadEventEnd - performance.timing.navigationStart) / 1000)",
    "filter_s": """
const box = document.querySelector('input[name=s]'), text = document.getElementById('q'), started = performance.now();
if (box) box.click();
else { text.value = 'lh799'; text.dispatchEvent(new Event('input')); }
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


def measure() -> dict[str, dict[str, float]]:
    """Return the figures of the pages of a night of the usual size, of a large run, and of two audits."""
    return {
        "night": _of_run(full_run),
        "5,000 verdicts": _of_run(large_run),
        "audit of 5,000 files": _of_audit(5_000),
        "audit of 20,000 files": _of_audit(20_000),
    }


def _of_run(make: Callable[[Path], Run]) -> dict[str, float]:
    """Return bytes and seconds to build the page of a run, and where Chromium is what it makes of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make(folder)
        began = time.perf_counter()
        path = write_report([run], folder)
        return _of_page(path, time.perf_counter() - began)


def _of_audit(files: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        path, rows = Path(name) / "audit.html", library_of(files)
        began = time.perf_counter()
        path.write_text("".join(audit_page(rows)), encoding="utf-8")
        return _of_page(path, time.perf_counter() - began)


def _of_page(path: Path, built: float) -> dict[str, float]:
    bare = len(re.sub(r"data:image/[^\"]+", "", path.read_text(encoding="utf-8")))
    found = {"bytes": path.stat().st_size, "bytes_without_pictures": bare, "build_s": built}
    return found | _in_browser(path)


def _in_browser(path: Path) -> dict[str, float]:
    """Return what Chromium, its network off, makes of a page, the least of some loads: others use this processor too.

    Its screens on a phone end where the folds begin.
    """
    if chromium_browser.missing():
        return {}
    browser = chromium_browser.start(path.parent / "profile")
    try:
        found: dict[str, float] = {}
        for _ in range(_LOADS):
            browser.get(path.as_uri())
            told = {name: browser.execute_async_script(script) for name, script in _DESKTOP.items()}
            found = {name: min(value, found.get(name, value)) for name, value in told.items()}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", _PHONE)
        height = browser.execute_script("return document.documentElement.scrollHeight")
        screens = browser.execute_script(_SCREENS)
        return found | {"phone_px_high": height} | ({"phone_screens_before_the_folds": screens} if screens else {})
    finally:
        browser.quit()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()) + "\n")
