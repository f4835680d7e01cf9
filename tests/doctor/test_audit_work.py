"""A batch survives what its files do: every path has one result, and the file that ended a child is the one blamed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from harness.doctor.audit import work as audit_work
from harness.doctor.audit.work import Task, run_local
from harness.law import reads
from harness.verdict.file_record import FileRecord

PATHS = [f"{number:02d}" for number in range(40)]


def results(monkeypatch: pytest.MonkeyPatch, workers: int, *, bad: tuple[str, ...]) -> dict[str, str]:
    def do(path: str, task: Task) -> str:
        if path in bad:
            what = bad.index(path) % 3
            if what == 0:
                os.abort()
            if what == 1:
                time.sleep(60)
            bytearray(1 << 31)
        return audit_work.unreadable(path, "fine").model_dump_json()

    monkeypatch.setattr(audit_work, "do", do)
    found: dict[str, str] = {}

    def keep(path: str, text: str) -> None:
        assert path not in found
        found[path] = FileRecord.model_validate_json(text).hazards[0].what

    run_local(PATHS, Task(seconds=0.5, memory=256 << 20), workers=workers, on_result=keep)
    assert sorted(found) == PATHS
    return found


def test_the_file_that_ends_a_child_is_blamed_and_the_others_of_its_batch_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = ("03", "04", "05", "20", "39")
    found = results(monkeypatch, 2, bad=bad)
    assert sorted(path for path, what in found.items() if what != "fine") == sorted(bad)
    assert "SIGABRT" in found["03"]
    assert found["04"] == "no answer within 0.5 s"
    assert "256 MiB" in found["05"]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_path_has_one_result(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    assert set(results(monkeypatch, workers, bad=()).values()) == {"fine"}


def test_a_slow_file_in_a_batch_of_slow_ones_keeps_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: str, task: Task) -> str:
        time.sleep(0.2)
        return audit_work.unreadable(path, "fine").model_dump_json()

    monkeypatch.setattr(audit_work, "do", slow)
    found: list[str] = []
    paths = PATHS[:8]
    run_local(
        paths,
        Task(seconds=0.5),
        workers=2,
        on_result=lambda path, text: found.append(FileRecord.model_validate_json(text).hazards[0].what),
    )
    assert found == ["fine"] * len(paths)


def test_the_tables_are_read_before_the_children_are_forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    audit_work.read_tables()
    rows = [audit_work.audit_file(str(path)) for path in written(tmp_path)]
    assert {row.format for row in rows} == {"kohya", "diffusers"}
    assert all(row.modules == 1 and row.prescription for row in rows)

    def read(path: Path) -> None:
        raise AssertionError(f"{path} is read in a child")

    monkeypatch.setattr("harness.law.known.read_toml", read)
    monkeypatch.setattr("harness.law.findings.read_toml", read)
    monkeypatch.setattr("harness.law.sizes.read_toml", read)
    once = reads._table.cache_info().misses
    assert [audit_work.audit_file(row.path).prescription for row in rows] == [row.prescription for row in rows]
    assert reads._table.cache_info().misses == once


def written(folder: Path) -> list[Path]:
    """Write the usual files."""
    paths = []
    for stem, names in audit_work._USUAL.items():
        paths.append(folder / f"{len(paths)}.safetensors")
        paths[-1].write_bytes(audit_work._zeros({f"{stem}.{half}.weight": (2, 2) for half in names}))
    return paths
