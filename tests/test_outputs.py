"""Files that hold somebody's work are replaced in one step or appended to in whole lines, by one process at a time."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.outputs import LineWriter, only_writer, read_lines, replacing


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("old")
    with pytest.raises(TypeError), replacing(target) as stream:
        stream.writelines([b"half of the new", "no bytes"])  # type: ignore[list-item]
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text() == "old"
    with replacing(target) as stream:
        stream.write(b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text() == "new"


def test_the_file_behind_a_link_is_replaced_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link") as stream:
        stream.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), replacing(Path("/dev/full")) as stream:
        stream.write(b"new")


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b'{"a": 1}\n{"b"')
    lines = LineWriter(file)
    lines.write("\u2028 two\x85 words")
    lines.close()
    assert [line for _, line in read_lines(file)] == [b'{"a": 1}', b'{"b"', "\u2028 two\x85 words".encode()]


def test_what_a_power_cut_left_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"one\n" + b"\0" * 4096 + b"\ntwo\n")
    assert list(read_lines(tmp_path / "lines")) == [(1, b"one"), (3, b"two")]


ROOT = Path(__file__).parents[1]
# What is no file that somebody keeps: a stream of lines, the runner's file, the kernel's, what goes with its folder.
IN_PLACE = {
    "harness/checks/patterns.py",
    "harness/doctor/audit/remote.py",
    "harness/doctor/audit/work.py",
    "harness/isolation/child.py",
    "harness/loaders/command.py",
    "harness/loaders/commits.py",
    "harness/outputs.py",
    "harness/report/ci.py",
    "harness/report/records.py",
}
WRITES = re.compile(r"""write_text\(|write_bytes\(|copyfile\(|open\([^)]*["'][wax]b?\+?["']""")


def test_no_source_writes_a_file_in_place() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "harness").rglob("*.py") if writes(path)}
    assert found <= IN_PLACE


def writes(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines()
    return any(
        WRITES.search(line) and "copytree if" not in line for line in lines
    )  # one copy goes to a temporary folder


def test_a_log_or_page_for_which_there_is_no_room_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    from harness.report.ci import write_sarif
    from harness.report.environment import new_header
    from harness.report.html import write_report
    from harness.report.records import Run

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("log.sarif", "results.jsonl"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    run = Run(new_header("lora-harness"), ())
    for write in (lambda: write_sarif(run, tmp_path / "log.sarif"), lambda: write_report([run], tmp_path)):
        with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
            write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log.sarif": "old", "results.jsonl": "old"}


HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom harness.outputs import only_writer\n"
    "with only_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def test_two_processes_do_not_write_one_file_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "run.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"is being written by process {process.pid} on .*; wait"),
            only_writer(target),
        ):
            pass
        process.kill()
    with only_writer(target), only_writer(target):
        pass
    assert list(tmp_path.iterdir()) == []
