"""What the pages print works as printed, in a fresh shell that knows nothing but the system's own PATH."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PATH = "/usr/local/bin:/usr/bin:/bin"
ACTIVATE = ". .venv/bin/activate"
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
NIGHTLY = (ROOT / "docs" / "nightly.md").read_text(encoding="utf-8")
SHORT = " --max-examples 2 --format kohya --bench qwen-image"  # the command as printed, and less of it


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a newcomer has it: the files of the repository, and `.venv` as `make` leaves it."""
    folder = tmp_path_factory.mktemp("fresh") / "lora-harness"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    venv = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    paths = [str(folder), *(path for path in sys.path if path.endswith("site-packages"))]
    (site / "harness_tests.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    tool = venv / "bin" / "lora-harness"
    tool.write_text(f"#!{venv}/bin/python\nfrom harness.cli import main\nmain()\n", encoding="utf-8")
    tool.chmod(0o755)
    return folder


def shell(checkout: Path, line: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(checkout.parent), "PATH": PATH, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", f"{ACTIVATE} && {line}"], cwd=checkout, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_the_readme_says_how_its_commands_are_found() -> None:
    before, _, after = README.partition(f"`{ACTIVATE}`")
    assert after
    assert "lora-harness check" not in before.replace("reproduce  lora-harness check", "")


PRINTED = {
    "lora-harness explain LH204": 0,
    "lora-harness loaders": 0,
    next(re.findall(r"reproduce  (lora-harness check [^\n]+)", README)[i] for i in (0,)): 1,
    **{line + SHORT: 0 for line in re.findall(r'lora-harness check "cmd:python [^\n]+', README)},
    **{line + SHORT: 0 for line in re.findall(r'lora-harness check "cmd:python [^\n]+', EXAMPLES)},
    **{line + SHORT: 0 for line in re.findall(r'lora-harness check "serve:python [^\n]+', README + EXAMPLES)},
}


def _marked(line: str) -> Any:
    return pytest.param(line, marks=[pytest.mark.slow] if '"cmd:' in line or '"serve:' in line else [])


@pytest.mark.parametrize("line", [_marked(line) for line in PRINTED])
def test_a_printed_command_works(line: str, checkout: Path) -> None:
    done = shell(checkout, line)
    assert done.returncode == PRINTED[line], done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_nightly_script_finds_its_environment_and_a_page_that_is_there(checkout: Path) -> None:
    (script,) = (block for block in re.findall(r"```bash\n(.*?)```", NIGHTLY, re.DOTALL) if block.startswith("#!"))
    short = script.replace(
        "--max-examples 2000", "--loader examples/raw_alpha.py:load --quick --no-images --max-examples 1"
    )
    (checkout / "nightly.sh").write_text(short, encoding="utf-8")
    environment = {"HOME": str(checkout.parent), "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}
    night = ["bash", str(checkout / "nightly.sh")]
    done = subprocess.run(
        night, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 1, done.stdout
    assert (
        Path(done.stdout.splitlines()[0].rpartition(": ")[2]).read_text(encoding="utf-8").startswith("<!doctype html>")
    )
    alone = {**environment, "LORA_HARNESS_VENV": "/nowhere", "LORA_NIGHTS": str(checkout.parent / "other")}
    done = subprocess.run(night, env=alone, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 127
    assert "no page, see" in done.stdout


@pytest.fixture(scope="module")
def own_model(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, but for README's example of a model of one's own."""
    folder = tmp_path_factory.mktemp("own")
    section = README.partition("## Your own model")[2]
    (text,) = re.findall(r"```python\n(import torch\n.*?)```", section, re.S)[:1]
    (folder / "my_model.py").write_text(text, encoding="utf-8")
    return folder


OWN = re.findall(r"lora-harness check peft --(?:bench|model) my_model[^\n]+", README)


@pytest.mark.parametrize("line", OWN)
def test_a_model_of_one_s_own_is_checked_as_printed(line: str, checkout: Path, own_model: Path) -> None:
    done = shell(checkout, f"cd {own_model} && {line} --max-examples 2 --format peft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"my[-_](phi3|model).*✓ right", done.stdout, re.S), done.stdout
    assert "layers take a LoRA" in done.stderr
    assert len(OWN) == 2
