"""The pytest door: options, report, xdist, and no effect on tests that are not its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.report.records import read_run

ROOT = Path(__file__).parents[1]
RAW = str(ROOT / "examples" / "raw_alpha.py") + ":load"


def pytest_run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def test_the_suite_runs_a_loader_and_writes_the_report(tmp_path: Path) -> None:
    done = pytest_run(
        tmp_path, "--pyargs", "harness.suite", f"--lora-loader={RAW}", "--lora-max-examples=5",
        "--lora-report=out", "-n", "2", "--dist", "loadgroup", "-k", "kohya-qwen-image-",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "LH201 alpha not divided by rank" in done.stdout
    run = read_run(tmp_path / "out" / "run.jsonl")
    assert run.footer is not None
    assert run.footer.exit_code == 1
    assert {v.code for v in run.verdicts if not v.ok} == {"LH201"}
    assert "LH201" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_the_suite_takes_a_bench_of_the_user_s_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom harness import bench\n"
        "@bench('mine')\ndef make(): return nn.Sequential(nn.Linear(4, 6))\n"
    )
    done = pytest_run(
        tmp_path, "--pyargs", "harness.suite", f"--lora-loader={RAW}", "--lora-bench=mine.py:make",
        "--lora-max-examples=3", "-k", "kohya-mine-scale",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "--bench mine.py:make" in done.stdout


def test_a_release_is_fetched_only_when_asked_for_and_without_a_network_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path / "releases"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    words = ("--pyargs", "harness.suite", "--lora-loader=peft==0.1.0")
    unasked = pytest_run(tmp_path, *words)
    assert "run `lora-harness install peft==0.1.0`, or give --install (pytest: --lora-install)" in unasked.stdout
    asked = pytest_run(tmp_path, *words, "--lora-install")
    assert asked.returncode == pytest.ExitCode.USAGE_ERROR
    assert asked.stderr.startswith("ERROR: --lora-install: no release of peft can be asked for: ")
    assert "Traceback" not in asked.stderr


def test_an_own_suite_can_take_the_checks_over(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from harness import parametrize_with_checks\n"
        f"@parametrize_with_checks([{RAW!r}], formats=['kohya'], benches=['qwen-image'], max_examples=5)\n"
        "def test_my_loader(check):\n    check()\n"
    )
    done = pytest_run(tmp_path, "test_mine.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 7 passed" in done.stdout
    assert "AssertionError: LH201" in done.stdout


def test_other_tests_and_their_gpu_marker_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_other():\n    pass\n")
    done = pytest_run(tmp_path, "test_other.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_missing_gpu_skips_with_the_reason_and_ends_the_run_when_required(tmp_path: Path) -> None:
    (tmp_path / "test_gpu.py").write_text("def test_gpu(cuda):\n    pass\n")
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    os.environ.update(environment)
    assert "no CUDA device" in pytest_run(tmp_path, "-rs", "test_gpu.py").stdout
    (tmp_path / "test_never_collected.py").write_text("raise SystemExit('collected')\n")
    required = pytest_run(tmp_path, "--lora-require-gpu", "--lora-report=out")
    assert required.returncode == pytest.ExitCode.USAGE_ERROR
    assert required.stderr.splitlines()[0].startswith("ERROR: --lora-require-gpu: no CUDA device that torch ")
    assert not (tmp_path / "out").exists()


def test_each_cell_is_checked_in_one_worker(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(
        "import os\nfrom pathlib import Path\nfrom harness.loaders.live.peft import load as real\n"
        f"SEEN = Path({str(tmp_path)!r}) / 'seen'\n"
        "def load(model, lora, *, strength=1.0):\n"
        "    SEEN.mkdir(exist_ok=True)\n    (SEEN / str(os.getpid())).touch()\n"
        "    return real(model, lora, strength=strength)\n"
    )
    done = pytest_run(
        tmp_path, "--pyargs", "harness.suite", "--lora-loader=counted.py:load", "--lora-max-examples=2",
        "-n", "2", "--dist", "loadgroup", "-k", "peft-qwen-image and not silence and not deep",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "seen").iterdir())) == 2  # qwen-image and qwen-image-fused, a child process each


def test_a_run_that_crashes_in_the_middle_is_reported_and_red(tmp_path: Path) -> None:
    (tmp_path / "test_crash.py").write_text(
        "import os\nfrom harness import Verdict\n"
        "def test_first(request):\n"
        "    request.node.lora_verdicts = [Verdict(loader='l', check='scale', outcome='passed')]\n"
        "def test_second():\n    os._exit(9)\n"
    )
    done = pytest_run(tmp_path, "--lora-report=out", "test_crash.py")
    assert done.returncode == 9
    run = read_run(tmp_path / "out" / "run.jsonl")
    assert [v.outcome for v in run.verdicts] == ["passed"]
    assert run.status == "cut"


@pytest.mark.slow  # it starts torch for every file
def test_a_command_loader_has_its_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from harness import Verdict\nfrom harness.checks import run\n"
        "run.call_limit = lambda channel, seconds: seconds\n"
        "def check_cell(cell, plan, on_measured):\n"
        "    return [Verdict(loader=cell.subject.spec, check='smoke', outcome='passed', seconds=cell.allowed,\n"
        "                    examples=plan.examples_in(cell))]\n"
        "run.check_cell = check_cell\n"
    )
    command = "cmd:sh -c true {base} {lora} {strength} {out}"
    done = pytest_run(
        tmp_path, "--pyargs", "harness.suite", f"--lora-loader={command}", "--lora-report=out",
        "-k", "peft-qwen-image-smoke",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (verdict,) = read_run(tmp_path / "out" / "run.jsonl").verdicts
    assert (verdict.examples, verdict.seconds) == (10, 120.0)


def test_a_call_is_ended_at_the_limit_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "import time\nfrom harness import loader\n"
        "@loader(formats={'peft'}, benches={'gpt2'})\ndef load(model, lora, *, strength=1.0): time.sleep(60)\n"
    )
    words = ("--pyargs", "harness.suite", "--lora-loader=late.py:load", "-k", "smoke")
    assert "no answer within the time limit of 0.5 s" in pytest_run(tmp_path, *words, "--lora-time-limit=0.5").stdout
    assert "invalid seconds value: 'nan'" in pytest_run(tmp_path, *words, "--lora-time-limit=nan").stderr
