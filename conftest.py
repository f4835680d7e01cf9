"""Load the plugin, the same options and markers as an installed copy; what `make test` leaves to `make test-slow`."""

from __future__ import annotations

from typing import Any

import pytest

pytest_plugins = ["harness.plugin"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the suite would repeat as slow: a bench or a variant that a package was checked on in another way."""
    seen: set[tuple[str, ...]] = set()
    again: dict[Any, bool] = {}
    for item in items:
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")  # type: ignore[attr-defined]
        if (cell := getattr(check, "cell", None)) is None:
            continue
        loader = cell.subject.title
        package = loader.partition("-")[0]
        brings = {(loader, cell.format), (package, cell.format, cell.bench_name), (package, cell.variant_name)}
        if again.setdefault(cell, brings <= seen):
            item.add_marker(pytest.mark.slow)
        seen |= brings
