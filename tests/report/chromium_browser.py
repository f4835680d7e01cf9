"""Start a real headless Chromium (Debian: chromium and chromium-driver) with the network off."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)


def missing() -> str | None:
    """Return why no browser can be started, None when one can."""
    if not any(map(shutil.which, _NAMES)) or shutil.which("chromedriver") is None:
        return "no chromium with chromedriver (Debian: apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ModuleNotFoundError:
        return "selenium is not installed (pip install selenium)"
    return None


def start(profile: Path, *, served: bool = False) -> Any:
    """Return a driver whose user data lie in `profile`; the caller quits it.

    The network is off, or `served` from this machine alone.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, _NAMES)))
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    if served:
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": not served, "latency": 0, "downloadThroughput": -served, "uploadThroughput": -served}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    return browser
