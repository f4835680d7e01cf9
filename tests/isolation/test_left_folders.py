"""Folders of jobs whose run was killed with all its processes go with the next run; those in use stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.isolation.jobs import run_jobs

KILLED = """
import os, signal, sys
from harness.isolation.jobs import run_jobs
def job(channel):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as when all of them are killed at once
    open(os.path.join(os.environ["TMPDIR"], "left"), "w").close()
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
run_jobs([job])
"""
RUN = "from harness.isolation.jobs import run_jobs\nrun_jobs([lambda channel: None])"


def with_temporary(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run([sys.executable, "-c", script], env=environment, text=True, timeout=60, check=False)


def aged(folder: Path) -> Path:
    os.utime(folder, (1, 1))
    return folder


def test_the_next_run_removes_what_a_run_left_that_was_killed_with_all_its_processes(tmp_path):
    assert with_temporary(tmp_path, KILLED).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert list(left.iterdir())
    with_temporary(tmp_path, RUN)
    assert list(tmp_path.iterdir()) == [left], "it may be one that is just being made"
    aged(left)
    with_temporary(tmp_path, RUN)
    assert not list(tmp_path.iterdir())


def test_folders_of_runs_that_go_on_and_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "work").touch()
    link = tmp_path / "lora-harness-job-held-link"
    link.symlink_to(outside)
    os.utime(link, (1, 1), follow_symlinks=False)

    def job(channel):
        channel.send(tempfile.gettempdir())
        with channel.call("waits"):
            time.sleep(3)

    def other_run(index, folder):
        aged(Path(folder))
        assert with_temporary(tmp_path, RUN).returncode == 0
        assert Path(folder).is_dir()
        seen.append(folder)

    seen: list[str] = []
    run_jobs([job], on_event=other_run)
    assert len(seen) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lora-harness-job-held-link", "outside"]
    assert (outside / "work").exists()
