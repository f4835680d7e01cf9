"""Whatever a loader does to its process, its cell ends with the right outcome, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.checks.cell import Cell
from harness.checks.plan import Plan
from harness.checks.run import check_cells
from harness.isolation import limits, subject
from harness.isolation.limits import Limits
from harness.loaders.registry import resolve
from harness.verdict.verdict import Verdict
from tests.isolation.hostile_loaders import LOADERS, OUTCOMES, SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
SHORT = Plan(max_examples=2, shrink=False)
LEFT = f"sleep {SECONDS}"


def check(name: str, monkeypatch: pytest.MonkeyPatch, *others: object) -> list[Verdict]:
    monkeypatch.setattr(subject, "GRACE_SECONDS", 0.5)
    cells = [Cell(resolve(load), "kohya", "qwen-image") for load in (LOADERS[name], *others)]  # type: ignore[arg-type]
    return check_cells(cells, SHORT, Limits(seconds=1.5, memory=2 * limits.GIB, workers=1))


def running(what: str) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.startswith(what)]


@pytest.mark.parametrize("name", LOADERS)
def test_a_hostile_loader_has_the_outcome_that_it_must(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark, shared = tmp_path / "mark", set(os.listdir("/dev/shm"))
    monkeypatch.setenv("LORA_HARNESS_TEST_MARK", str(mark))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    verdicts = check(name, monkeypatch)
    code, what = OUTCOMES[name]
    wrong = [verdict for verdict in verdicts if not verdict.ok]
    assert [verdict.code for verdict in wrong][:1] == ([code] if code else []), wrong
    assert not wrong or what in wrong[0].title
    assert not mark.exists()
    assert running(LEFT) == []
    assert not {name for name in os.listdir("/dev/shm") if "lora-harness" in name} - shared


def test_the_cells_beside_a_hostile_one_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = check("forges_a_pickle", monkeypatch, LOADERS["goes_to_another_folder"])
    assert {v.outcome for v in verdicts if "another_folder" in v.loader} == {"passed"}


MODULES = {
    "ends its process": ("import os; os._exit(0)", "importing it ended its process"),
    "leaves a thread": ("import threading, time; threading.Thread(target=time.sleep, args=(300,)).start()", None),
    "leaves a process": (
        f"import subprocess; subprocess.Popen(['sleep', '{SECONDS}'], start_new_session=True)",
        None,
    ),
}


@pytest.mark.parametrize("what", MODULES)
def test_a_module_is_imported_where_it_can_do_no_harm(what: str, tmp_path: Path) -> None:
    text, said = MODULES[what]
    file = tmp_path / "mine.py"
    file.write_text(f"{text}\ndef load(model, lora, *, strength=1.0): pass\n")
    command = [sys.executable, "-m", "harness", "check", f"{file}:load", "--format", "kohya", "--bench", "qwen-image"]
    done = subprocess.run([*command, "--max-examples", "2"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (2 if said else 1)
    assert (said or "LoRA has no effect") in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert running(LEFT) == []


def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import pathlib, subprocess, time\n"
        "def load(model, lora, *, strength=1.0):\n"
        f"    subprocess.Popen(['sleep', '{SECONDS}'], start_new_session=True)\n"
        f"    pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n    time.sleep(300)\n"
    )
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-m", "harness", "check", f"{file}:load", "--format", "kohya", "--bench", "qwen-image"]
    with subprocess.Popen([*command, "-j", "1"], env=environment, stderr=subprocess.DEVNULL) as process:
        _until((tmp_path / "begun").exists)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    _until(lambda: running(LEFT) == [] and not list((tmp_path / "temporary").iterdir()))


def _until(true: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)
