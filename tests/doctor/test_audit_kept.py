"""Nothing of an audit is lost: not the rows that were there, not those of a run that was killed, not the innocent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.commands.audit import command
from harness.doctor.audit import work as audit_work
from harness.doctor.audit.audit import audit_files
from harness.doctor.audit.output import beside, read_rows
from harness.doctor.audit.work import Task, run_local
from harness.errors import UserError
from harness.verdict.file_record import FileRecord, Hazard
from tests.doctor.test_audit import lora

FILES = 30


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for number in range(FILES):
        lora(tmp_path / "library" / f"{number:02d}.safetensors", seed=number)
    return tmp_path / "library"


def audit(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(command, [str(arg) for arg in args])
    assert done.exception is None or isinstance(done.exception, SystemExit | UserError), done.exception
    return done.exit_code, str(done.exception or "") + done.output


@pytest.mark.parametrize("resume", [False, True], ids=["fresh", "resumed"])
def test_a_killed_audit_keeps_what_was_there_and_what_it_read(library: Path, tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "rows.jsonl"
    assert audit(library, "--out", out, "--no-duplicates")[0] == 0
    before = out.read_bytes()
    program = (
        "import os, signal, sys\nfrom harness.doctor.audit import audit as a\n"
        "seen = []\nreal = a.AuditOptions\n"
        "from harness.commands.audit import command\nfrom harness.commands import screen\n"
        "def advance(self, *args):\n    seen.append(1)\n    if len(seen) == 12: os.kill(os.getpid(), signal.SIGKILL)\n"
        "screen.ProgressLine.advance = advance\ncommand(sys.argv[1:])\n"
    )
    for file in library.iterdir():
        os.utime(file, (1, 1))  # every file has to be read again
    args = [library, "--out", out, "-j", "0", *(["--resume"] if resume else [])]
    done = subprocess.run([sys.executable, "-c", program, *map(str, args)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == before
    fresh = [row for row in read_rows(out) if row.mtime == 10**9]
    assert len(fresh) == 12
    assert audit(library, "--out", out, "--resume")[0] == 0
    assert len(read_rows(out)) == FILES
    assert not beside(out).exists()


@pytest.mark.parametrize("name", ["notes.jsonl", "list.json", "table.csv", "page.html", "table.parquet"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_no_audit_wrote_is_not_touched(library: Path, tmp_path: Path, name: str, resume: bool) -> None:
    out = tmp_path / name
    out.write_text('{"my": "work"}\n')
    code, said = audit(library, "--out", out, *(["--resume"] if resume else []))
    assert code != 0
    assert name in said
    assert out.read_text() == '{"my": "work"}\n'


def test_a_cut_last_row_costs_that_row_only(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    audit(library, "--out", out)
    out.write_bytes(out.read_bytes()[:-40])
    assert len(read_rows(out)) == FILES - 1
    assert audit(library, "--out", out, "--resume")[0] == 0
    assert len(read_rows(out)) == FILES


def killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: int) -> dict[str, FileRecord]:
    """Read ten paths while somebody kills the process `times` times at the fourth."""
    marks = tmp_path / "killed"
    marks.mkdir(exist_ok=True)

    def do(path: str, task: Task) -> str:
        if path == "03" and len(list(marks.iterdir())) < times:
            (marks / str(time.monotonic_ns())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return FileRecord(path=path).model_dump_json()

    monkeypatch.setattr(audit_work, "do", do)
    found: dict[str, FileRecord] = {}
    paths = [f"{number:02d}" for number in range(10)]
    run_local(paths, Task(), workers=2, on_result=lambda p, t: found.update({p: FileRecord.model_validate_json(t)}))
    assert sorted(found) == paths
    return found


def test_a_process_killed_from_outside_blames_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all(not row.hazards for row in killed(monkeypatch, tmp_path, 1).values())


def test_a_file_at_which_two_were_killed_is_not_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = killed(monkeypatch, tmp_path, 2)
    assert [path for path, row in found.items() if row.hazards] == ["03"]
    assert found["03"].codes == ("LH798",)
    assert "SIGKILL" in found["03"].hazards[0].what


def test_what_was_not_judged_is_no_pass_and_read_again(library: Path, tmp_path: Path) -> None:
    rows = audit_files([library])
    blamed = [row.model_copy(update={"hazards": (Hazard(code="LH798", what="killed"),)}) for row in rows[:2]]
    known = [*blamed, *rows[2:]]
    assert all(not row.hazards for row in audit_files([library], known=known))


class _NoWorkers(Executor):
    """Takes work that nobody does."""

    def submit(self, *args: object, **options: object) -> Future[object]:  # type: ignore[override]
        return Future()

    def has_workers(self) -> bool:
        return False


def test_an_executor_without_workers_is_said(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_work, "_PATIENCE", 0.1)
    with pytest.raises(UserError, match="no worker is left"):
        audit_files([library], executor=_NoWorkers())


def test_resuming_with_other_paths_keeps_the_rows_that_are_there(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    audit(library, "--out", out)
    lora(tmp_path / "more" / "one.safetensors", seed=99)
    assert audit(tmp_path / "more", "--out", out, "--resume")[0] == 0
    assert len(read_rows(out)) == FILES + 1
    before = out.read_bytes()
    assert audit(tmp_path / "mistyped", "--out", out, "--resume")[0] != 0
    assert out.read_bytes() == before
