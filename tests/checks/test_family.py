"""A check is added in one file: what is said of the families everywhere is derived from what they declare."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from harness.checks import families, family
from harness.checks.family import Check, checks, family_names, judge
from harness.checks.observation import Observation
from harness.example import Example, Target
from harness.selftest.cases import broken_cases
from harness.verdict import codes
from harness.verdict.codes import CODES

ROOT = Path(__file__).parents[2]
EXTRA = """
from harness.checks.family import Sighting, judges

@judges("extra", finds="too many modules", codes=("LH499",))
def check_extra(observation):
    return [Sighting("LH499", observation)] if len(observation.example.targets) > 1 else []
"""


@pytest.fixture
def extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "extra.py").write_text(EXTRA)
    known = list(family._CHECKS)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    checks.cache_clear()
    yield
    family._CHECKS[:] = known
    sys.modules.pop("harness.checks.families.extra")
    checks.cache_clear()


def test_a_file_in_the_folder_is_a_family_that_judges(extra: None) -> None:
    assert set(family_names()) == {*FAMILIES, "extra"}
    two = Observation(Example((Target("x", 4, 8.0), Target("y", 4, 8.0))))
    assert [(found.code, found.family) for found in judge(two)] == [("LH499", "extra")]


FAMILIES = family_names()


def test_a_call_that_failed_comes_first_then_the_codes_count_up() -> None:
    assert FAMILIES[0] == "smoke"
    assert (*FAMILIES, "images", "verify", "inspect") == get_args(codes.Check)


@pytest.mark.parametrize("check", checks(), ids=lambda check: f"{check.family}-{check.codes[0]}")
def test_the_codes_of_a_check_exist_and_are_its_familys(check: Check) -> None:
    assert {CODES[code].family for code in check.codes} == {check.family}


def test_every_code_of_the_weights_has_a_check_and_a_broken_loader() -> None:
    emitted = {code for check in checks() for code in check.codes}
    assert len(emitted) == sum(len(check.codes) for check in checks())
    weights = {code for code, row in CODES.items() if row.family in FAMILIES}
    assert weights == emitted
    assert emitted <= {code for case in broken_cases() if case.fault for code in case.fault.codes}


def spelled(codes: list[str]) -> str:
    """Return the codes with each row of three or more as its ends: `LH104, LH301 to LH304`."""
    numbers = sorted(int(code.removeprefix("LH")) for code in codes)
    groups = [list(group) for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    rows = [[f"LH{number}" for _, number in group] for group in groups]
    return ", ".join(f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(row) for row in rows)


def test_the_table_of_the_readme_is_what_the_families_declare() -> None:
    table = re.search(
        r"\| family \| what it finds \|\n\| --- \| --- \|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text()
    )
    assert table
    *rows, images = table[1].splitlines()
    own = {name: [check for check in checks() if check.family == name] for name in FAMILIES}
    assert rows == [
        f"| {name.replace('_', ' ')} | {', '.join(check.finds for check in found)} "
        f"({spelled([code for check in found for code in check.codes])}) |"
        for name, found in own.items()
    ]
    assert images.startswith("| images |")
