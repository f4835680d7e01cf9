"""The shipped suite: every check family of every loader under test, one test per format and bench.

pytest --pyargs harness.suite --lora-loader=package.module:load
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.checks.parametrize import CellTest
    from harness.checks.plan import Plan


def plan_of(config: pytest.Config) -> Plan:
    """Return the plan of the options; without `--lora-loader` the shipped known failures apply."""
    from harness.checks.known import known_failures
    from harness.checks.plan import Plan

    named, source = config.getoption("--lora-loader"), config.getoption("--lora-known-failures")
    return Plan(
        config.getoption("--lora-max-examples"),
        config.getoption("--lora-seed"),
        known=known_failures(source or (None if named else "shipped")),
        share=1.0 if named else 1 / 20,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from harness.checks.parametrize import cell_tests
    from harness.isolation.limits import Limits
    from harness.loaders.registry import available

    try:
        plan = plan_of(metafunc.config)
        loaders = metafunc.config.getoption("--lora-loader") or available()
        benches = metafunc.config.getoption("--lora-bench") or None
        limits = Limits(metafunc.config.getoption("--lora-time-limit"), workers=1)
        each = (cell_tests(spec, benches=benches, plan=plan, limits=limits) for spec in loaders)
        tests = [test for of_one in each for test in of_one]
    except UserError as error:
        raise pytest.Collector.CollectError(f"error: {error}") from None
    metafunc.parametrize("check", tests, ids=repr)


def test_loader(check: CellTest, request: pytest.FixtureRequest) -> None:
    verdicts = check.verdicts()
    request.node.lora_verdicts = verdicts
    bad = [verdict for verdict in verdicts if not verdict.ok]
    if bad:
        pytest.fail("\n\n".join(verdict.text() for verdict in bad), pytrace=False)
    if all(verdict.outcome == "xfailed" for verdict in verdicts):
        pytest.xfail("; ".join(verdict.reason or verdict.title for verdict in verdicts))
