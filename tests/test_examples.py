"""The doors under examples/, each copied somewhere else and run as its README says, in a process of its own."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.report.records import read_run

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOORS = sorted(folder.name for folder in EXAMPLES.glob("door_*"))
COMMAND = "cmd:sh merge.sh {base} {lora} {strength} {out}"


def copy(door: str, to: Path) -> Path:
    """Copy a door out of the checkout: nothing there may lean on its place."""
    return Path(shutil.copytree(EXAMPLES / door, to / door, ignore=shutil.ignore_patterns("__pycache__", "reports")))


def python(folder: Path, *args: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in `folder` with the harness importable, as if it were installed, and nothing else of here."""
    paths = os.pathsep.join(filter(None, (str(ROOT), path)))
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=folder, env=env, timeout=300)


def pytest_in(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args)


def harness(folder: Path, *args: str, **options: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "harness", *args, **options)


def verdicts(done: subprocess.CompletedProcess[str]) -> list[Mapping[str, str]]:
    """Return the verdicts that `lora-harness check --json` printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in map(json.loads, done.stdout.splitlines()) if line["kind"] == "verdict"]
    assert found
    return found


@pytest.mark.parametrize("server", ["python serve_merge.py", "node serve_merge.js"])
def test_the_servers_are_right_and_silent_about_nothing(server: str) -> None:
    if shutil.which(server.split()[0]) is None:
        pytest.skip(f"{server.split()[0]} is not installed")
    args = ("--format", "kohya", "--bench", "qwen-image-fused", "--max-examples", "3", "-j", "1", "--json")
    found = verdicts(harness(EXAMPLES, "check", f"serve:{server}", *args))
    assert {v["check"] for v in found} > {"scale", "silence"}


@pytest.mark.parametrize("door", DOORS)
def test_each_door_is_told_in_five_lines_and_listed(door: str) -> None:
    assert len((EXAMPLES / door / "README.md").read_text(encoding="utf-8").splitlines()) <= 5
    assert f"`{door}/`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_the_shipped_suite_runs_on_the_configured_loader(tmp_path: Path) -> None:
    folder = copy("door_suite", tmp_path)
    done = pytest_in(folder, "--lora-max-examples=5", "-k", "qwen-image-fused")
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(folder / "reports" / "run.jsonl")
    assert {(v.loader, v.format, v.bench) for v in run.verdicts} == {("acme_lora:load", "kohya", "qwen-image-fused")}
    assert run.status == "passed"
    assert (folder / "reports" / "index.html").is_file()


def test_an_own_suite_takes_each_check_as_a_test(tmp_path: Path) -> None:
    folder = copy("door_own_suite", tmp_path)
    edit(folder / "tests" / "test_acme_lora.py", "max_examples=50", "max_examples=5")
    done = pytest_in(folder, "-rp", "-k", "test_loader or not fused")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED tests/test_acme_lora.py::test_loader[acme_lora:load-kohya-qwen-image-fused-scale]" in done.stdout
    assert "PASSED tests/test_acme_lora.py::test_the_loader_scales_as_training_did[qwen-image]" in done.stdout


@pytest.mark.slow  # it starts torch forty times
def test_a_command_merges_in_an_environment_without_the_harness(tmp_path: Path) -> None:
    folder = copy("door_command", tmp_path)
    other = environment(tmp_path / "other")
    one = ("--module", "transformer_blocks.0.attn.to_q=4:8")
    args = ("--format", "kohya", "--bench", "qwen-image", "-j", "1", "--json")
    done = harness(folder, "check", COMMAND, *args, *one, ACME_PYTHON=str(other))
    assert {(v["loader"], v["outcome"]) for v in verdicts(done)} == {(COMMAND, "passed")}


def test_an_entry_point_gives_the_loader_a_name(tmp_path: Path) -> None:
    folder = install(copy("door_entry_point", tmp_path))
    listed = harness(tmp_path, "loaders", path=str(folder)).stdout.splitlines()
    assert [line.split() for line in listed if line.startswith("acme")] == [["acme", "1.0", "available"]]
    args = ("--bench", "qwen-image", "--max-examples", "5", "-j", "1", "--json")
    found = verdicts(harness(tmp_path, "check", "acme", *args, path=str(folder)))
    assert {(v["loader"], v["loader_version"], v["outcome"]) for v in found} == {("acme", "1.0", "passed")}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def environment(folder: Path) -> Path:
    """Make an environment that has torch and safetensors but no harness, and return its Python."""
    import torch

    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    (site / "harness.py").write_text("raise ImportError('there is no harness here')\n", encoding="utf-8")
    return folder / "bin" / "python"


def install(source: Path) -> Path:
    """Install the package into a folder as pip would, without a network: its code and its entry points."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = source.parent / "site"
    shutil.copytree(source / "acme_lora", site / "acme_lora")
    info = site / f"acme_lora-{project['version']}.dist-info"
    info.mkdir()
    head = ("Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}", "")
    (info / "METADATA").write_text("\n".join(head), encoding="utf-8")
    points = configparser.ConfigParser()
    points.read_dict(project["entry-points"])
    with (info / "entry_points.txt").open("w", encoding="utf-8") as file:
        points.write(file)
    return site
