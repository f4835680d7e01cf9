"""The Hypothesis profiles of `conftest.py`, tried on a test that draws numbers and one that fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOY = """
from pathlib import Path
from hypothesis import given, strategies as st

DRAWN = Path(__file__).with_name("drawn.txt")

@given(st.integers())
def test_holds(number):
    with DRAWN.open("a") as file:
        print(number, file=file)

@given(st.integers(0, 10**9))
def test_fails(number):
    with DRAWN.open("a") as file:
        print(number, file=file)
    assert number < 10**6, "over a million"
"""


class Toy:
    """A folder with this repository's conftest.py and two tests; nothing is kept from one run to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("conftest.py", "slow_tests.txt"):
            shutil.copy(Path(__file__).with_name(name), folder)
        (folder / "test_toy.py").write_text(TOY, encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")

    def run(self, command: str, **variables: str) -> str:
        """Run a shell command there, `CI` and the profile as given only, and return what it printed."""
        env = {name: value for name, value in os.environ.items() if name not in ("CI", "HYPOTHESIS_PROFILE")}
        env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)
        (self.folder / "drawn.txt").unlink(missing_ok=True)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=self.folder, env=env | variables)
        return done.stdout + done.stderr

    @property
    def drawn(self) -> list[str]:
        return (self.folder / "drawn.txt").read_text(encoding="utf-8").split()


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def test_by_default_the_same_examples_are_drawn_with_and_without_ci(toy: Toy) -> None:
    drawn = []
    for variables in ({}, {}, {"CI": "true"}):
        printed = toy.run("python -m pytest -k holds", **variables)
        assert "1 passed" in printed, printed
        assert "seed" not in printed
        drawn.append(toy.drawn)
    assert len(drawn[0]) >= 100
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("workers", ["", " -n 2"])
def test_a_random_run_prints_its_seed_and_the_command_that_repeats_a_failure(toy: Toy, workers: str) -> None:
    if workers:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    printed = toy.run(f"python -m pytest -k fails{workers}", HYPOTHESIS_PROFILE="random")
    first = toy.drawn
    (seed,) = re.findall(r"^Hypothesis: profile random, seed (\d+)$", printed, re.M)
    (command,) = re.findall(r"^HYPOTHESIS_PROFILE=random .*", printed, re.M)
    assert command.endswith(f"--hypothesis-seed={seed}")
    again = toy.run(command)
    assert "over a million" in again
    assert "1 failed" in again
    assert toy.drawn == first
    toy.run(command.replace(seed, f"{seed}0"))
    assert toy.drawn != first


def test_two_random_runs_draw_different_examples(toy: Toy) -> None:
    drawn = []
    for _ in range(2):
        printed = toy.run("python -m pytest -k holds", HYPOTHESIS_PROFILE="random")
        assert "1 passed" in printed, printed
        drawn.append(toy.drawn)
    assert drawn[0] != drawn[1]
