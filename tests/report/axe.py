"""axe-core, the accessibility checks of Deque, fetched with npm and never kept: a skip where npm cannot."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

VERSION = "4.14.1"
_RUN = """
axe.run(document, {resultTypes: ['violations']}).then((found) => arguments[0](found.violations
  .filter((one) => one.impact === 'serious' || one.impact === 'critical')
  .map((one) => one.id + ': ' + one.nodes.slice(0, 3).map((node) => node.html.slice(0, 200)).join(' | '))));
"""


@cache
def source() -> str | None:
    """Return axe's script, None where it cannot be had."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"axe-core@{VERSION}", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
        packed = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or packed is None:
            return None
        with tarfile.open(packed) as archive:
            member = archive.extractfile("package/axe.min.js")
            return member.read().decode("utf-8") if member else None


def serious_faults(browser: Any) -> list[str]:
    """Return what axe calls serious or critical on the open page, a line per rule."""
    script = source()
    if script is None:
        pytest.skip("axe-core cannot be fetched: no npm, or no registry")
    browser.execute_script(script)
    browser.set_script_timeout(120)
    found: list[str] = browser.execute_async_script(_RUN)
    return found
