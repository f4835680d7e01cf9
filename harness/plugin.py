"""The pytest plugin: options and markers of the suite, and a report from any run that used it.

It touches no test but its own: without a `--lora-…` option nothing changes for other suites.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from harness.report.records import RunWriter

_WRITER = pytest.StashKey["RunWriter"]()
_MARKERS = (
    "gpu: needs a CUDA device; skips without one, --lora-require-gpu refuses to begin",
    "images: makes pictures with a diffusion pipeline",
    "slow: more than a few seconds",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the `--lora-…` options."""
    group = parser.getgroup("lora-harness", "LoRA loader conformance")
    group.addoption(
        "--lora-loader", action="append", default=[], metavar="SPEC", help="loader to check; repeat for more"
    )
    group.addoption(
        "--lora-bench", action="append", default=[], metavar="BENCH", help="only this bench, a name or FILE.py:FUNCTION"
    )
    group.addoption(
        "--lora-install", action="store_true", help="fetch releases that --lora-loader names and that are not here"
    )
    group.addoption("--lora-report", metavar="DIR", help="write run.jsonl and index.html to DIR")
    group.addoption("--lora-max-examples", type=int, metavar="N", help="random examples per format and bench")
    group.addoption("--lora-seed", type=int, default=0, metavar="S", help="seed of all that is drawn")
    group.addoption(
        "--lora-time-limit", type=seconds, metavar="SECONDS", help="limit for one call of a loader, as of `check`"
    )
    group.addoption("--lora-known-failures", metavar="FILE", help="TOML file of known failures, or `shipped`")
    group.addoption(
        "--lora-require-gpu", action="store_true", help="without a GPU end at once, exit 4, instead of skipping"
    )


def seconds(text: str) -> float:
    """Read the seconds of an option; argparse tells what is none by the name of this function."""
    found = float(text)
    if not 0 < found < float("inf"):
        raise ValueError(text)
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; not in xdist's workers, ask for the GPU and open the run record that are wanted."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if hasattr(config, "workerinput"):
        return
    if config.getoption("--lora-require-gpu"):
        _require_gpu()
    _fetch(config)
    if folder := config.getoption("--lora-report"):
        from harness.report.environment import new_header
        from harness.report.records import RunWriter

        header = new_header(
            ["pytest", *config.invocation_params.args], seed=config.getoption("--lora-seed"), profile="pytest"
        )
        try:
            config.stash[_WRITER] = RunWriter(Path(folder) / "run.jsonl", header).__enter__()
        except OSError as error:
            raise pytest.UsageError(f"--lora-report={folder}: {error.strerror or error}") from None


def _fetch(config: pytest.Config) -> None:
    """Fetch the releases that are named and not here, where that is wanted; says first how large they are."""
    if not config.getoption("--lora-install"):
        return
    from harness.errors import UserError
    from harness.loaders.pinned import install_named

    try:
        install_named(config.getoption("--lora-loader"), lambda line: print(f"install: {line}", file=sys.stderr))
    except UserError as error:
        raise pytest.UsageError(f"--lora-install: {error}") from None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Check each cell in one worker under `--dist loadgroup`."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from harness.suite.schedule import CellScheduling

    return CellScheduling(config, log)


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> Any:
    """The CUDA device; without one the test skips, or fails under `--lora-require-gpu`."""
    from harness.isolation.device import cuda_devices, no_device

    if not cuda_devices():
        pytest.skip(no_device())
    import torch

    return torch.device("cuda")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the verdicts of a check to its report, in a form that travels between xdist's processes."""
    report = yield
    verdicts = getattr(item, "lora_verdicts", None)
    if report.when == "call" and verdicts:
        report.lora_verdicts = [  # type: ignore[attr-defined]
            verdict.model_dump(mode="json") for verdict in verdicts
        ]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the verdicts of a finished check at once, so that a crash later loses none."""
    from_worker: Iterable[dict[str, Any]] = getattr(report, "lora_verdicts", ())
    if _ACTIVE and from_worker:
        from harness.verdict.verdict import Verdict

        _ACTIVE[-1].write(*(Verdict.model_validate(verdict) for verdict in from_worker))


def _require_gpu() -> None:
    """Say that there is none before thousands of tests are collected of which none could run."""
    from harness.isolation.device import cuda_devices, no_device

    if not cuda_devices():
        raise pytest.UsageError(f"--lora-require-gpu: {no_device()}")


_ACTIVE: list[RunWriter] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the run record reachable for reports as they come in."""
    if _WRITER in session.config.stash:
        _ACTIVE.append(session.config.stash[_WRITER])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Close the run record and write the HTML report."""
    if _WRITER not in session.config.stash:
        return
    from harness.report.html import write_report
    from harness.report.records import read_run

    writer = session.config.stash[_WRITER]
    _ACTIVE.remove(writer)
    writer.exit_code = 0 if exitstatus == 0 else 1
    interrupted = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
    writer.__exit__(RuntimeError if interrupted else None, None, None)
    path = writer.path
    if path is not None:
        write_report([read_run(path)], path.parent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the report is."""
    if folder := config.getoption("--lora-report"):
        terminalreporter.write_line(f"LoRA report: {Path(folder) / 'index.html'}")
