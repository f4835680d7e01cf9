"""An audit keeps its rows on the disk and not in memory, and tells files apart whatever their names are made of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from harness.commands.audit import command
from harness.doctor.audit import work as audit_work
from harness.doctor.audit.audit import AuditOptions, audit_files, audit_into, find_files
from harness.doctor.audit.output import beside, read_rows, write_rows
from harness.doctor.audit.rows import RowStore, digest
from harness.errors import LoraFileError
from harness.verdict.file_record import FileRecord
from tests.doctor.test_audit import lora

FILES = 6
FORMATS = ("jsonl", "json", "csv", "html", "parquet")
ODD = (b"a\xff", b"a\xfe", b"b\xfe")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for number in range(FILES):
        lora(tmp_path / "library" / f"{number}.safetensors", seed=number)
    return tmp_path / "library"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Three files whose names are no UTF-8, the last two with the same weights."""
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    sources = [lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2, 2)]
    for name, source in zip(ODD, sources, strict=True):
        try:
            shutil.copyfile(source, os.path.join(folder, name + b".safetensors"))
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    return tmp_path / "odd"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(command, [*map(str, arguments), "-j", "0"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which every path is added that is read from here on."""
    seen: list[str] = []
    real = audit_work.do
    monkeypatch.setattr(audit_work, "do", lambda path, task: (seen.append(path), real(path, task))[1])
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_names_that_are_no_utf8_are_files_of_their_own(odd: Path, workers: int) -> None:
    rows = audit_files([odd], workers=workers)
    assert [row.format for row in rows] == ["kohya"] * 3
    assert [row.duplicate_of for row in rows] == [None, None, rows[0].path]
    assert rows[0].path.endswith("a\\udcfe.safetensors")


@pytest.mark.parametrize("suffix", FORMATS)
def test_names_that_are_no_utf8_stand_in_every_format(odd: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"rows.{suffix}"
    run(odd, "--out", out)
    assert out.read_bytes().decode("utf-8", "ignore" if suffix == "parquet" else "strict")


def test_names_that_are_no_utf8_are_resumed_once(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    run(odd, "--out", out)
    seen = reads(monkeypatch)
    run(odd, "--out", out, "--resume")
    assert not seen
    assert len(read_rows(out)) == len(ODD)


def test_two_names_that_are_spelled_alike_are_both_read_again(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(odd / "a\\udcff.safetensors", seed=7)
    out = tmp_path / "rows.jsonl"
    run(odd, "--out", out)
    seen = reads(monkeypatch)
    run(odd, "--out", out, "--resume", "--no-duplicates")
    assert len(seen) == 2
    assert len(read_rows(out)) == len(ODD) + 1


def test_tensor_names_that_join_to_one_text_are_no_duplicates(tmp_path: Path) -> None:
    for file, names in (("one", ("a\nb", "c")), ("two", ("a", "b\nc"))):
        save_file({name: torch.ones(4, 4) for name in names}, tmp_path / f"{file}.safetensors")
    assert digest(tmp_path / "one.safetensors") != digest(tmp_path / "two.safetensors")


@pytest.mark.parametrize("name", ["\u2028", "é", "\ud7ff", "\x7f", '"', "\\", "a\u0000b"])
def test_tensors_of_any_name_are_told_apart_and_found(tmp_path: Path, name: str) -> None:
    for file, layer in (("one", name), ("other", f"{name}{name}")):
        halves = {f"{layer}.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
        save_file(halves, tmp_path / f"{file}.safetensors")
    shutil.copyfile(tmp_path / "one.safetensors", tmp_path / "same.safetensors")
    rows = {Path(row.path).stem: row.duplicate_of for row in audit_files([tmp_path], workers=0)}
    assert rows == {"one": None, "other": None, "same": str(tmp_path / "one.safetensors")}


def test_a_file_that_is_cut_while_it_is_hashed_has_no_digest(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library / "0.safetensors"
    real = sorted

    def cutting(names: Any, **options: Any) -> Any:
        os.truncate(path, path.stat().st_size - 10)
        return real(names, **options)

    monkeypatch.setattr("harness.doctor.audit.rows.sorted", cutting, raising=False)
    with pytest.raises(LoraFileError, match="shorter than it was"):
        digest(path)


def test_energies_that_were_not_asked_for_before_are_read_now(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    run(library, "--out", out)
    run(library, "--out", out, "--resume", "--energy")
    assert all(row.energies for row in read_rows(out))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_format_is_read_back_as_it_was_written(library: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    rows = audit_files([library], workers=0)
    assert read_rows(write_rows(tmp_path / f"rows.{suffix}", rows)) == rows
    assert read_rows(write_rows(tmp_path / f"none.{suffix}", [])) == []


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_that_somebody_laid_out_anew_is_read(library: Path, tmp_path: Path, indent: int | None) -> None:
    out = tmp_path / "rows.json"
    run(library, "--out", out)
    out.write_text(json.dumps(json.loads(out.read_text()), indent=indent))
    assert len(read_rows(out)) == FILES


def test_a_command_that_fails_leaves_no_empty_file(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert CliRunner().invoke(command, [str(tmp_path / "libary"), "--out", str(out)]).exit_code != 0
    assert not beside(out).exists()


def test_the_rows_of_a_store_are_found_again(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows")
    places = [store.add(FileRecord(path=f"{number}é\u2028")) for number in range(5)]
    assert [store.get(place).path for place in reversed(places)] == [f"{n}é\u2028" for n in (4, 3, 2, 1, 0)]
    store.close()
    with (tmp_path / "rows").open("ab") as stream:
        stream.write(b'{"kind":"fi')
    again = RowStore(tmp_path / "rows")
    assert [place for place, _ in again.older()] == places
    assert again.get(again.add(FileRecord(path="new"))).path == "new"
    again.close()


def test_results_of_an_executor_are_let_go(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A future that is kept keeps the rows of its batch."""
    alive: list[int] = []
    futures: set[int] = set()

    class Watched(Future[Any]):
        def __init__(self) -> None:
            super().__init__()
            futures.add(id(self))

        def __del__(self) -> None:
            futures.discard(id(self))

    class Executor(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **options: Any) -> Future[Any]:
            future = Watched()
            future.set_result(function(*args, **options))
            return future

    monkeypatch.setattr(audit_work, "run_batch", lambda batch, options: [(path, "{}") for path in batch])
    paths = [str(number) for number in range(80)]
    audit_work.run_on(Executor(1), paths, audit_work.Task(), on_result=lambda path, row: alive.append(len(futures)))
    assert len(alive) == len(paths)
    assert alive[-1] <= 2 < alive[0]


GROWTH = """
import os, resource, sys
from pathlib import Path
from benchmarks.audit_memory import audited, fake, files
from harness.doctor.audit import work
folder, count = Path(sys.argv[1]), int(sys.argv[2])
work.do = fake(folder / "one")
files(folder / "library", count)
audited(folder / "library", folder / "rows.jsonl", resume=False)
audited(folder / "library", folder / "rows.jsonl", resume=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_hardly_grows_with_the_rows(tmp_path: Path) -> None:
    """A million rows must fit into 1 GB: less than 900 bytes for each."""
    peaks = []
    for count in (100, 4100):
        (tmp_path / str(count)).mkdir()
        arguments = [sys.executable, "-c", GROWTH, str(tmp_path / str(count)), str(count)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 4000 * 900


def test_a_path_that_is_found_twice_is_one_row(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when somebody replaces a file between two looks at its folder."""
    twice = [*find_files([library]), *find_files([library])]
    monkeypatch.setattr("harness.doctor.audit.audit.find_files", lambda paths, schemes: twice)
    store = RowStore(tmp_path / "rows")
    assert len(audit_into(store, [library], AuditOptions(workers=0))) == FILES
    store.close()
