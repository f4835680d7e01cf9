"""The shipped suite: every check family of every loader under test, one test per format and bench.

pytest --pyargs harness.suite --lora-loader=package.module:load
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness.checks.parametrize import CellTest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from harness.checks.parametrize import cell_tests
    from harness.checks.run import Limits
    from harness.suite.plan import loaders_under_test, plan_of

    plan = plan_of(metafunc.config)
    loaders = loaders_under_test(metafunc.config)
    tests = [test for spec in loaders for test in cell_tests(spec, plan=plan, limits=Limits(workers=1))]
    metafunc.parametrize("check", tests, ids=repr)


def test_loader(check: CellTest, request: pytest.FixtureRequest) -> None:
    verdicts = check.verdicts()
    request.node.lora_verdicts = verdicts
    bad = [verdict for verdict in verdicts if not verdict.ok]
    if bad:
        pytest.fail("\n\n".join(verdict.text() for verdict in bad), pytrace=False)
    if all(verdict.outcome == "xfailed" for verdict in verdicts):
        pytest.xfail("; ".join(verdict.reason or verdict.title for verdict in verdicts))
