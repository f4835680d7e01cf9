"""Where the built fixtures are: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def fixtures_folder() -> Path:
    """Return the folder of the built fixtures."""
    package = Path(__file__).parent
    installed = package / "_fixtures"
    return installed if installed.is_dir() else package.parent / "fixtures"
