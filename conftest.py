"""Load the plugin, the same options and markers as an installed copy; what `make test` leaves to `make test-slow`."""

from __future__ import annotations

from typing import Any

import pytest

pytest_plugins = ["harness.plugin"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the suite repeats: each loader, and each format, bench and variant of a package, comes once."""
    seen: set[Any] = set()
    again: dict[Any, bool] = {}
    for item in items:
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")  # type: ignore[attr-defined]
        if (cell := getattr(check, "cell", None)) is None:
            continue
        loader = cell.subject.title
        package = loader.partition("-")[0]
        brings = {loader, *((package, what) for what in (cell.format, cell.bench_name, cell.variant_name))}
        if again.setdefault(cell, brings <= seen):
            item.add_marker(pytest.mark.slow)
        seen |= brings
