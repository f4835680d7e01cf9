"""Python for WebAssembly, fetched with npm and pip as docs/nightly.md says and never kept: None where they cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "314.0.7"
_WHEELS = ("--python-version", "3.14", "--platform", "pyemscripten_2026_0_wasm32", "--only-binary=:all:", "pydantic")


def fetched(folder: Path) -> Path | None:
    """Return `folder` with pyodide and its wheels in it, None where they cannot be had."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "-d", str(folder), *_WHEELS]
    for command in ([npm, "pack", f"pyodide@{VERSION}", "--silent"], pip):
        if subprocess.run(command, cwd=folder, capture_output=True, timeout=300, check=False).returncode:
            return None
    packed = next(folder.glob("pyodide-*.tgz"), None)
    if packed is None:
        return None
    with tarfile.open(packed) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder
