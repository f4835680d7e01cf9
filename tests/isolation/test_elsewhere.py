"""A child that goes on in another interpreter: the same orders, limits and end as every child, other packages."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.isolation import process
from harness.isolation.elsewhere import Elsewhere
from harness.isolation.subject import Apart, SubjectLostError, subject_process

ANSWERS = """
    import json, os, sys, time
    import acme

    def begin(told):
        print("this goes to no pipe of the parent's")
        def answer(order, on_part):
            if order == "die":
                os._exit(3)
            if order == "sleep":
                time.sleep(60)
            if order == "fork":
                if os.fork() == 0:
                    time.sleep(60)
                return os.getpid()
            if order == "part":
                on_part({"half": 1})
            libraries = sorted({"torch", "numpy"} & set(sys.modules))
            return {"acme": acme.WHICH, "told": told, "variable": os.environ.get("ACME"), "tmp": os.environ["TMPDIR"],
                    "harness": sys.modules["harness"].__file__, "libraries": libraries}
        return answer

    def broken(told):
        raise ImportError("acme needs a library that is not here")
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Two folders with a package of one name; the first has the answers too."""
    for which in ("one", "two"):
        (tmp_path / which).mkdir()
        (tmp_path / which / "acme.py").write_text(f"WHICH = {which!r}\n")
    (tmp_path / "one" / "answers.py").write_text(textwrap.dedent(ANSWERS))
    return str(tmp_path / "one"), str(tmp_path / "two")


@pytest.fixture
def asked(folders: tuple[str, str]) -> Iterator[Apart]:
    place = Elsewhere("answers:begin", {"number": 7}, folders, {"ACME": "yes"})
    with subject_process(lambda order, part: None, apart=True, elsewhere=place) as found:
        assert isinstance(found, Apart)
        yield found


def test_it_finds_the_folders_first_and_this_package_by_its_path(asked, folders):
    answer = asked.ask("what", 20.0)
    assert answer["acme"] == "one"
    assert answer["told"] == {"number": 7}
    assert answer["variable"] == "yes"
    assert Path(answer["harness"]) == Path(process.__file__).parents[1] / "__init__.py"
    assert answer["libraries"] == []  # nothing of what the loader does not need itself


def test_the_order_of_folders_decides(folders):
    place = Elsewhere("answers:begin", {}, folders[::-1])
    with subject_process(lambda order, part: None, apart=False, elsewhere=place) as asked:  # apart whatever is said
        assert asked.ask("what", 20.0)["acme"] == "two"


def test_parts_of_an_answer_come_on_the_way(asked):
    parts: list[object] = []
    asked.ask("part", 20.0, parts.append, parts=1)
    assert parts == [{"half": 1}]


def test_one_that_dies_is_started_again_for_the_next_question(asked):
    with pytest.raises(SubjectLostError, match="exit status 3"):
        asked.ask("die", 20.0)
    assert asked.ask("what", 20.0)["acme"] == "one"


def test_one_that_hangs_is_killed_in_its_time(asked, monkeypatch):
    monkeypatch.setattr("harness.isolation.subject.GRACE_SECONDS", 0.5)
    asked.ask("what", 20.0)
    began = time.monotonic()
    with pytest.raises(SubjectLostError, match=r"no answer within 0\.5 s"):
        asked.ask("sleep", 0.5)
    assert time.monotonic() - began < 20


def test_nothing_is_left_of_it(folders):
    with subject_process(
        lambda order, part: None, apart=True, elsewhere=Elsewhere("answers:begin", {}, folders)
    ) as asked:
        folder = Path(asked.ask("what", 20.0)["tmp"])
        pid = asked.ask("fork", 20.0)
        assert folder.is_dir()
    assert not folder.exists()
    assert not [each for each in Path("/proc").glob("[0-9]*") if _group(each) == pid]


def _group(entry: Path) -> int:
    try:
        state, _, group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(group)


def test_what_cannot_be_imported_there_says_so(folders):
    place = Elsewhere("answers:broken", {}, folders)
    with subject_process(lambda order, part: None, apart=True, elsewhere=place) as asked:
        assert isinstance(asked, Apart)
        with pytest.raises(SubjectLostError, match="acme needs a library that is not here"):
            asked.begin()


def test_an_interpreter_that_is_not_there_says_so(folders):
    place = Elsewhere("answers:begin", {}, folders, python="/nowhere/python")
    child = subject_process(lambda order, part: None, apart=True, elsewhere=place)
    with child as asked, pytest.raises(SubjectLostError, match="No such file"):
        asked.ask("what", 20.0)


def test_its_memory_is_limited(folders):
    Path(folders[0], "answers.py").write_text(
        "def begin(told):\n    return lambda order, part: len(bytearray(order))\n"
    )
    place = Elsewhere("answers:begin", {}, folders)
    with subject_process(lambda order, part: None, apart=True, memory_limit=64 << 20, elsewhere=place) as asked:
        assert asked.ask(1 << 20, 20.0) == 1 << 20
        with pytest.raises(SubjectLostError) as lost:
            asked.ask(8 << 30, 20.0)
        assert lost.value.status == "memory"


def test_the_parent_keeps_its_own_search_path(asked):
    before = list(sys.path)
    asked.ask("what", 20.0)
    assert sys.path == before
    assert "acme" not in sys.modules
    assert "ACME" not in os.environ
