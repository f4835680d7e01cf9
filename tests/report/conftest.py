"""Fixtures of the report's tests: a real headless Chromium, or a skip with the reason."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # report_samples and chromium_browser lie beside the tests

import chromium_browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start Chromium with the network off."""
    if reason := chromium_browser.missing():
        pytest.skip(reason)
    browser = chromium_browser.start(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.quit()


@pytest.fixture
def opened(chromium: Any) -> Callable[..., Any]:
    """Open a report, with a hash, and fail on anything that the browser has to say about it."""

    def open_report(page: Path, fragment: str = "") -> Any:
        chromium.get("about:blank")
        chromium.get_log("browser")
        chromium.get(page.resolve().as_uri() + fragment)
        complaints = chromium.get_log("browser")
        assert complaints == [], complaints
        return chromium

    return open_report
