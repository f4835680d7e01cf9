"""Profiles of Hypothesis for this repository's own tests, and skips for what the core install lacks.

`HYPOTHESIS_PROFILE=random` draws a seed, prints it, and gives every failure the command that repeats it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings

settings.register_profile("repository", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("random", derandomize=False, deadline=None, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "repository")
settings.load_profile(PROFILE)

HERE = Path(__file__).parent
SLOW = tuple(
    line for line in (HERE / "slow_tests.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
)
TOGETHER = ("test_nights.py", "test_diagnose_page.py", "test_findings.py")  # what their tests share takes long to make
NO_TORCH = "torch is not installed: pip install 'lora-harness[check]'"
NEEDS_TORCH = (
    "benches", "checks", "commands/test_pace.py", "commands/test_releases.py", "doctor",
    "files/test_adapter.py", "files/test_bad_input.py", "files/test_blocks.py", "files/test_detect.py",
    "files/test_flux_readers.py", "files/test_formats.py", "files/test_gguf.py", "files/test_imports.py",
    "files/test_match.py", "files/test_other_readers.py", "files/test_patterns.py", "files/test_peft_folder.py",
    "files/test_real_readers.py", "files/test_roundtrip.py", "files/test_roundtrip_special.py",
    "fixtures", "fuzz", "gpu", "images", "isolation",
    "law/test_grammar.py", "loaders",
    "measure", "quality", "reference", "selftest", "variants", "verdict/test_blocks.py", "test_as_printed.py",
    "test_exports.py", "test_failures.py", "test_nights.py",
)  # fmt: skip
# Tests of other files that load a model.
LOADS_A_MODEL = (
    "test_examples.py::test_the_shipped_suite", "test_examples.py::test_an_own_suite",
    "test_examples.py::test_a_command_merges", "test_examples.py::test_an_entry_point",
    "test_plugin.py::test_the_suite_runs", "test_plugin.py::test_an_own_suite", "test_plugin.py::test_a_missing_gpu",
    "test_plugin.py::test_each_cell", "test_plugin.py::test_a_run_that_crashes",
    "test_plugin.py::test_a_command_loader", "test_plugin.py::test_a_release_is_fetched",
    "test_readme.py::test_the_failure_in_the_readme",
    "test_cli.py::test_a_right_loader", "test_cli.py::test_raw_alpha", "test_cli.py::test_the_reproduce_line",
    "test_cli.py::test_rank_and_alpha", "test_cli.py::test_json_lines", "test_cli.py::test_bad_usage",
    "test_cli.py::test_a_loader_that_ends", "report/test_schema.py::test_what_inspect_and_audit",
    "report/test_hostile_text.py::test_junit", "test_findings.py::test_the_script_of_a_finding",
    "test_plugin.py::test_the_suite_takes_a_bench", "commands/test_sweep_foreign.py::test_seeds_and_prompts",
    "commands/test_since.py::test_since_and_baseline", "commands/test_since.py::test_a_run_that_is_none",
)  # fmt: skip
DRAWS = (
    "report/test_gates.py", "report/test_html.py", "report/test_records.py", "report/test_run_page.py",
    "report/test_schema.py", "report/test_site.py",
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out folders whose own conftest needs torch; everything else is skipped with its reason."""
    return True if not find_spec("torch") and collection_path in (HERE / "images", HERE / "loaders") else None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip a file that cannot be imported without torch."""
    place = module_path.relative_to(HERE).as_posix() if module_path.is_relative_to(HERE) else ""
    listed = any(place == name or place.startswith(f"{name}/") for name in NEEDS_TORCH)
    return Skipped.from_parent(parent, path=module_path) if listed and not find_spec("torch") else None


class Skipped(pytest.Module):
    """A test file that is skipped before it is imported."""

    def collect(self) -> list[Any]:
        pytest.skip(NO_TORCH, allow_module_level=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that load a model, or draw pictures, where that is not installed; mark those that take long."""
    for item in items:
        place = item.nodeid.removeprefix("tests/")
        if place.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if not find_spec("torch") and place.startswith(LOADS_A_MODEL):
            item.add_marker(pytest.mark.skip(reason=NO_TORCH))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed of a random run; a worker of xdist takes that of its controller."""
    if PROFILE == "random" and config.getoption("--hypothesis-seed") is None:
        given = getattr(config, "workerinput", {}).get("hypothesis_seed")
        config.option.hypothesis_seed = given or str(secrets.randbelow(10**8))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of xdist the seed: it parses the command line anew, and would draw one of its own."""
    node.workerinput["hypothesis_seed"] = node.config.getoption("--hypothesis-seed")


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send the tests of some files to one worker each: marks cannot say it, as `harness.suite.schedule` explains."""
    if config.getoption("dist") != "loadgroup":
        return None
    from harness.suite.schedule import CellScheduling

    class FileScheduling(CellScheduling):
        def _split_scope(self, nodeid: str) -> str:
            place = nodeid.partition("::")[0]
            return place if place.endswith(TOGETHER) else super()._split_scope(nodeid)

    return FileScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which seed a random run had."""
    if PROFILE == "random":
        terminalreporter.write_line(f"Hypothesis: profile random, seed {config.getoption('--hypothesis-seed')}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip report tests that draw pictures without pillow; give a random failure its command."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    drawing = item.nodeid.removeprefix("tests/").startswith(DRAWS)
    if drawing and isinstance(error, ModuleNotFoundError) and error.name in ("PIL", "matplotlib"):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {error}")
    if report.failed and PROFILE == "random" and is_hypothesis_test(getattr(item, "obj", None)):
        seed = item.config.getoption("--hypothesis-seed")
        command = f"HYPOTHESIS_PROFILE=random python -m pytest '{item.nodeid}' --hypothesis-seed={seed}"
        report.sections.append(("reproduce", command))
    return report
