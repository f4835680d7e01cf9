"""Whatever goes wrong with a command, it says one sentence and ends with the right code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.report.records import exit_code_of, read_run

ROOT = Path(__file__).parents[1]
LORA = str(ROOT / "fixtures" / "loras" / "r8_a16" / "peft")
LOADER = f"{ROOT / 'examples' / 'raw_alpha.py'}:load"
HARNESS = [sys.executable, "-m", "harness"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
ONE_CELL = ("--format", "kohya", "--bench", "qwen-image", "--max-examples", "2")


def run(*args: str, shell: str = "{}", **options: object) -> subprocess.CompletedProcess[str]:
    command = shell.format(" ".join(f"'{arg}'" for arg in [*HARNESS, *args]))
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300, **options
    )  # type: ignore[call-overload]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done  # type: ignore[no-any-return]


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "args", [("inspect", LORA), ("explain", "LH201"), ("audit", LORA, "--json"), ("--help",)], ids=" ".join
)
def test_a_full_disk_is_said(args: tuple[str, ...]) -> None:
    done = run(*args, shell="{} > /dev/full")
    assert (done.returncode, sentence(done)) == (2, "error: No space left on device")


@pytest.mark.parametrize("option", ["--baseline", "--known-failures"])
def test_a_device_is_no_file_of_earlier_results(option: str, tmp_path: Path) -> None:
    done = run("run", "--out", str(tmp_path / "out"), option, "/dev/zero")
    assert done.returncode == 2
    assert "/dev/zero" in sentence(done)
    assert "Is a device, a file is needed" in sentence(done)


def test_a_closed_standard_output_is_said() -> None:
    done = run("explain", "LH201", shell="{} >&-")
    assert done.returncode == 2
    assert "standard output is closed" in sentence(done)


def test_a_reader_that_has_gone_is_no_failure_to_talk_of() -> None:
    for command in (("explain", "LH201"), ("inspect", LORA)):
        done = run(*command, shell="{} | head -0; echo ${{PIPESTATUS[0]}} >&2")
        assert done.stderr.strip() == "141"


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import pathlib, time\ndef load(model, lora, *, strength=1.0):\n"
        f"    pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n    time.sleep(300)\n"
    )
    command = [*HARNESS, "check", f"{file}:load", *ONE_CELL, "-j", "1"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c
    ) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1].strip() == "error: interrupted"
    assert process.returncode == 130


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background


NEEDS = {
    "hypothesis": ("check", LOADER),
    "torch": ("repair", LORA, "--to", "kohya", "--out", "/tmp/never.safetensors"),
    "diffusers": ("sweep", "peft", "--quick", "--out", "/tmp/never"),
}


@pytest.mark.parametrize("module", NEEDS)
def test_a_missing_extra_is_named(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from harness.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, *NEEDS[module]]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300)
    assert done.returncode == 2
    assert f'this needs {module}, which is not installed: pip install "lora-harness[check]"' in sentence(done)


def test_an_impossible_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (str(tmp_path / "file" / "below"), "/proc/x", str(tmp_path / ("a" * 300))):
        done = run("run", "--loader", LOADER, "--no-images", "--quick", "--out", out)
        assert done.returncode == 2
        assert sentence(done).startswith("error: ")


def test_what_a_loader_does_not_declare_is_no_pass() -> None:
    done = run("check", "peft", "--format", "kohya", "--bench", "qwen-image")
    assert done.returncode == 2
    assert "Nothing was measured." in done.stdout


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({}, 2),
        ({"skipped": 3}, 2),
        ({"passed": 1, "skipped": 3}, 0),
        ({"xfailed": 1}, 0),
        ({"refused": 1}, 1),
        ({"failed": 1, "passed": 9}, 1),
    ],
)
def test_a_green_is_earned(counts: dict[str, int], code: int) -> None:
    assert exit_code_of(counts) == code


def wrong_later(tmp_path: Path) -> tuple[str, Path]:
    file = tmp_path / "mine.py"
    file.write_text(
        (ROOT / "examples" / "raw_alpha.py")
        .read_text()
        .replace("strength * (1.0 if alpha is None else alpha)", "strength * adapter.modules[name].trained_scale")
    )
    return f"{file}:load", file


def test_a_gate_compares_with_an_earlier_run_and_is_red_everywhere(tmp_path: Path) -> None:
    loader, file = wrong_later(tmp_path)
    out, earlier = tmp_path / "out", tmp_path / "earlier.jsonl"
    command = ("run", "--loader", loader, "--quick", "--max-examples", "2", "--no-images", "--out", str(out))
    assert run(*command).returncode == 0
    (out / "run.jsonl").rename(earlier)
    file.write_text((ROOT / "examples" / "raw_alpha.py").read_text())
    done = run(*command, "--baseline", str(earlier))
    found, page = read_run(out / "run.jsonl"), (out / "index.html").read_text()
    assert done.returncode == 1
    assert found.footer
    assert (found.footer.exit_code, found.status) == (1, "failed")
    assert found.footer.gate[0].startswith("new violation: ")
    assert "Worse than the baseline: new violation" in done.stdout
    assert "Worse than the baseline: new violation" in page
    assert "<title>failed" in page.lower().replace("✕ ", "")
    assert json.loads((out / "history.jsonl").read_text().splitlines()[-1])["status"] == "failed"


@pytest.mark.slow  # two whole runs
def test_a_gate_that_only_a_rule_closes_is_red_too(tmp_path: Path) -> None:
    loader, _ = wrong_later(tmp_path)
    out, earlier = tmp_path / "out", tmp_path / "earlier.jsonl"
    command = ("run", "--loader", loader, "--quick", "--max-examples", "2", "--no-images", "--out", str(out))
    assert run(*command).returncode == 0
    (out / "run.jsonl").rename(earlier)
    done = run(*command, "--baseline", str(earlier), "--rule", "run.seconds:any:0.0")
    page = (out / "index.html").read_text()
    assert done.returncode == 1
    assert read_run(out / "run.jsonl").status == "failed"
    assert "Worse than the baseline: run.seconds" in page


@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
def test_a_run_is_not_compared_with_itself(how: str, tmp_path: Path) -> None:
    loader, _ = wrong_later(tmp_path)
    written, baseline = tmp_path / "run.jsonl", tmp_path / "baseline.jsonl"
    written.write_text("kept")
    if how == "link":
        baseline.symlink_to(written)
    elif how == "hard link":
        baseline.hardlink_to(written)
    else:
        baseline = written
    done = run("run", "--loader", loader, "--no-images", "--out", str(tmp_path), "--baseline", str(baseline))
    assert done.returncode == 2
    assert "is the file that this run writes" in sentence(done)
    assert written.read_text() == "kept"
