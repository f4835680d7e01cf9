"""The core install works with the oldest releases that it allows, and with every Python that it names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MINORS = ("3.10", "3.11", "3.12", "3.13")
LORA = "fixtures/loras/r8_a16/peft"


def test_the_floors_are_those_of_the_package() -> None:
    (core,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.DOTALL | re.MULTILINE)
    wanted = dict(re.findall(r'"([a-z]+)>=([\d.]+)', core))
    pinned = dict(re.findall(r"^([a-z]+)==([\d.]+)$", (ROOT / "floors.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert pinned.keys() == wanted.keys()
    for name, floor in wanted.items():
        assert re.fullmatch(rf"{re.escape(floor)}(\.0)*", pinned[name]), name


def interpreter(minor: str) -> str | None:
    """Return a Python of this minor version, wherever one is."""
    homes = sorted((Path.home() / ".pyenv" / "versions").glob(f"{minor}.*/bin/python"))
    return next(map(str, homes), None) or shutil.which(f"python{minor}")


@pytest.mark.slow
@pytest.mark.parametrize("minor", MINORS)
def test_the_core_install_works_on_every_python(minor: str, tmp_path: Path) -> None:
    python = interpreter(minor)
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"no Python {minor} here")
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    floors = ["-c", str(ROOT / "floors.txt")] if minor != "3.13" else []
    own = str(tmp_path / "venv" / "bin" / "python")
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *floors, str(ROOT)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for args, code in (
        (["inspect", LORA], 0),
        (["audit", "fixtures/loras"], 0),
        (["explain", "LH201"], 0),
        (["check", "peft"], 2),
    ):
        command = [str(Path(own).with_name("lora-harness")), *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_the_pythons_are_those_that_the_package_names() -> None:
    assert 'requires-python = ">=3.10"' in PYPROJECT
    assert sys.version_info >= (3, 10)
