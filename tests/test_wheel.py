"""The built wheel, unpacked outside the checkout: everything is in it, and the commands run from it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from harness.cli import COMMANDS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the tools that are installed, so without a network."""
    for tool in ("build", "hatchling"):
        pytest.importorskip(tool)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> frozenset[str]:
    with zipfile.ZipFile(wheel) as archive:
        return frozenset(archive.namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(unpacked: Path, folder: Path, *args: str) -> str:
    """Run Python in `folder`, with the unpacked wheel before any installed copy, and return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=folder, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["base", "loras", "known_failures", "broken_loaders", "correct_loaders"])
def test_every_built_fixture_is_in_the_wheel(names: frozenset[str], folder: str) -> None:
    tracked = committed(f"fixtures/{folder}")
    assert tracked
    assert {f"harness/_fixtures/{name.removeprefix('fixtures/')}" for name in tracked} <= names


def test_every_file_of_the_package_is_in_the_wheel(names: frozenset[str]) -> None:
    tracked = committed("harness")
    assert {Path(name).suffix for name in tracked} >= {".py", ".json", ".j2", ".css", ".js"}
    assert tracked <= names


def test_type_checkers_are_told_that_the_package_is_typed(names: frozenset[str]) -> None:
    assert "harness/py.typed" in names


def test_nothing_else_is_in_the_wheel(names: frozenset[str]) -> None:
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"harness", "lora_harness"}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    inside = {name for name in names if Path(name).name.startswith("test_")}
    assert inside == {"harness/suite/test_loader.py"}


def test_the_wheel_declares_its_command_and_its_pytest_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (points,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "[console_scripts]\nlora-harness = harness.cli:main" in points
    assert "[pytest11]\nharness.plugin = harness.plugin" in points


def test_the_pipeline_opens_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "from diffusers import QwenImageTransformer2DModel; from harness.images import base_pipeline, lora_file;"
        "print(base_pipeline(), lora_file('r8_a16', 'kohya').is_file());"
        "model = QwenImageTransformer2DModel.from_pretrained(base_pipeline() / 'transformer');"
        "print(sum(p.numel() for p in model.parameters()) > 1000)"
    )
    first, second = python(unpacked, tmp_path, "-c", code).splitlines()
    assert first == f"{unpacked / 'harness' / '_fixtures' / 'base'} True"
    assert second == "True"


def test_the_commands_run_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    assert all(name in python(unpacked, tmp_path, "-m", "harness", "--help") for name in COMMANDS)
    assert "peft " in python(unpacked, tmp_path, "-m", "harness", "loaders")
    tiny = ("--format", "kohya", "--bench", "qwen-image", "--module", "transformer_blocks.0.attn.to_q=4:8", "-j", "1")
    where = "import harness; print(harness.__file__)"
    assert python(unpacked, tmp_path, "-c", where).startswith(str(unpacked))
    shown = python(unpacked, tmp_path, "-m", "harness", "check", "diffusers", *tiny, "--known-failures", "shipped")
    assert "The loader reproduces the training" in shown


def committed(folder: str) -> frozenset[str]:
    """Return the files of the checkout under `folder`, but for what Python left there."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return frozenset(path.relative_to(ROOT).as_posix() for path in files)
