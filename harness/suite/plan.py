"""What the suite runs, from the pytest options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.checks.plan import Plan

if TYPE_CHECKING:
    import pytest


def loaders_under_test(config: pytest.Config) -> list[str]:
    """Return the loaders named by `--lora-loader`, or every loader that is installed here."""
    named: list[str] = config.getoption("--lora-loader")
    if named:
        return named
    from harness.loaders.registry import installed

    return [each.name for each in installed() if each.available]


def plan_of(config: pytest.Config) -> Plan:
    """Return the plan of the options; without `--lora-loader` the shipped known failures apply."""
    from harness.commands.options import known_failures

    source = config.getoption("--lora-known-failures")
    if source is None and not config.getoption("--lora-loader"):
        source = "shipped"
    return Plan(
        config.getoption("--lora-max-examples"),
        config.getoption("--lora-seed"),
        known=tuple(known_failures(source)),
        share=1.0 if config.getoption("--lora-loader") else 1 / 20,
    )
