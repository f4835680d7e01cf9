"""Every test that `slow_tests.txt` leaves out of `make test` is there, under that name."""

from __future__ import annotations

import pytest

from tests.conftest import HERE, SLOW


@pytest.mark.parametrize("line", SLOW)
def test_a_slow_test_is_there(line: str) -> None:
    place, _, name = line.partition("::")
    assert f"def {name.partition('[')[0]}(" in (HERE / place).read_text(encoding="utf-8")
