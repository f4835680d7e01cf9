from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCS = ROOT / "docs" / "nightly.md"
HOOKS = ROOT / ".pre-commit-hooks.yaml"


def scripts() -> Iterator[tuple[str, str]]:
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            for number, step in enumerate(job["steps"]):
                if "run" in step:
                    yield f"{path.stem}-{name}-{number}", step["run"]
    for number, block in enumerate(blocks("bash")):
        yield f"docs-{number}", block


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


SCRIPTS = dict(scripts())


def test_the_three_workflows_are_there() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "gpu", "nightly"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_fits_the_published_schema(path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    broken = tmp_path / "broken.yml"
    broken.write_text("on: push\njobs: {x: {runs-on: y, steps: [{runn: true}]}}\n", encoding="utf-8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(broken)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_asks_for_no_more_than_it_needs(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"]["contents"] == "read"
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    triggers = workflow[True]  # YAML 1.1 reads `on` as true
    assert "pull_request_target" not in triggers
    assert not ("pull_request" in triggers and "self-hosted" in str(workflow["jobs"]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_bash_and_takes_nothing_from_expressions(name: str) -> None:
    assert "${{" not in SCRIPTS[name]
    done = subprocess.run(["bash", "-n"], input=SCRIPTS[name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if "lora-harness " in script])
def test_every_command_and_option_in_a_script_exists(name: str) -> None:
    cli = importlib.import_module("harness.cli").main
    for command, rest in re.findall(r"lora-harness (\w+)([^\n|>]*)", SCRIPTS[name].replace("\\\n", " ")):
        found = cli.get_command(click.Context(cli), command)
        assert found is not None, f"no command {command}"
        options = {option for parameter in found.params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= options


def test_the_pytest_options_in_the_gpu_workflow_exist() -> None:
    plugin = (ROOT / "harness" / "plugin.py").read_text(encoding="utf-8")
    script = next(script for script in SCRIPTS.values() if "pytest" in script)
    for option in re.findall(r"--lora-[a-z-]+", script):
        assert f'"{option}"' in plugin


def test_the_hook_manifest_names_a_command_and_matches_lora_files() -> None:
    (hook,) = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))
    assert {"id", "name", "entry", "language"} <= set(hook)
    assert hook["entry"].split() == ["lora-harness", "inspect"]
    assert re.search(hook["files"], "loras/style.safetensors")
    assert not re.search(hook["files"], "notes.txt")
    if shutil.which("pre-commit"):
        subprocess.run(["pre-commit", "validate-manifest", str(HOOKS)], check=True)
    assert hook["id"] in yaml.safe_load(blocks("yaml")[0])["repos"][0]["hooks"][0]["id"]


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, Any]:
    """A stand-in `lora-harness` that writes what a run writes and exits as told."""
    tool = tmp_path / "bin" / "lora-harness"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\nwhile [ "$1" != --out ]; do shift; done\n'
        'echo "{}" >> "$2/history.jsonl"\necho page > "$2/index.html"\nexit "$CODE"\n',
        encoding="utf-8",
    )
    tool.chmod(0o755)
    return dict(os.environ) | {"LORA_HARNESS_VENV": str(tmp_path), "LORA_NIGHTS": str(tmp_path / "nights")}


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_cron_script_keeps_the_report_and_speaks_only_when_red(code: int, fake: dict[str, Any]) -> None:
    script = next(block for block in blocks("bash") if block.startswith("#!"))
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", script], env=fake | {"CODE": str(code)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert bool(done.stdout) is bool(code)
    nights = Path(fake["LORA_NIGHTS"])
    assert (nights / "latest" / "index.html").is_file()
    assert (nights / "history.jsonl").read_text(encoding="utf-8") == "{}\n{}\n"


@pytest.mark.parametrize(("known", "does"), [("", "issue create"), ("7", "issue comment 7")])
def test_a_red_night_opens_one_issue_and_then_comments_on_it(known: str, does: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    gh = tmp_path / "bin" / "gh"
    gh.write_text('#!/bin/sh\nif [ "$2" = list ]; then echo "$KNOWN"; else echo "$@" >> gh.log; fi\n', encoding="utf-8")
    gh.chmod(0o755)
    script = next(script for script in SCRIPTS.values() if "gh issue create" in script)
    env = {
        "PATH": f"{gh.parent}:{os.environ['PATH']}",
        "KNOWN": known,
        "TITLE": "The night is red",
        "RUN_URL": "https://x",
        "PACKAGES": "pinned",
    }
    repeat = "HYPOTHESIS_PROFILE=random python -m pytest 'tests/test_x.py::test_x' --hypothesis-seed=7"
    if known:
        (tmp_path / "reports" / "out").mkdir(parents=True)
        (tmp_path / "reports" / "out" / "tests.txt").write_text(f"E assert\n--- reproduce ---\n{repeat}\n")
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], env=env, cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "gh.log").read_text(encoding="utf-8").startswith(does)
    body = (tmp_path / "body.md").read_text(encoding="utf-8")
    assert "stopped before it wrote a record" in body
    assert (repeat in body) is bool(known)


def cut_run(folder: Path) -> None:
    """Write the record of a run that was killed: a header, one verdict, no footer."""
    from report_samples import failed, write_run

    write_run(folder, [failed("acme")])
    kept = (folder / "run.jsonl").read_text(encoding="utf-8").splitlines()[:-1]
    (folder / "run.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def real(folder: Path) -> Path:
    """Write a `lora-harness` that is this one, in the place of a virtual environment."""
    tool = folder / ".venv" / "bin" / "lora-harness"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m harness "$@"\n', encoding="utf-8")
    tool.chmod(0o755)
    return tool


def test_the_issue_of_a_night_that_was_cut_says_so_below_what_it_had(tmp_path: Path) -> None:
    cut_run(tmp_path / "reports" / "out")
    real(tmp_path)
    (tmp_path / "gh").write_text('#!/bin/sh\necho "$@" >> gh.log\n', encoding="utf-8")
    (tmp_path / "gh").chmod(0o755)
    script = next(script for script in SCRIPTS.values() if "gh issue create" in script)
    env = dict(os.environ) | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN_URL": "x", "PACKAGES": "pinned"}
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], env=env, cwd=tmp_path, capture_output=True, check=True)
    body = (tmp_path / "body.md").read_text(encoding="utf-8")
    assert "acme" in body
    assert "The run was cut short: above is what it had until then." in body


def test_the_cron_script_writes_the_page_of_a_night_that_was_cut(tmp_path: Path) -> None:
    tool = real(tmp_path)
    inner = tool.with_name("inner")
    tool.rename(inner)
    cut_run(tmp_path / "cut")
    tool.write_text(
        f'#!/bin/sh\n[ "$1" = run ] || exec {inner} "$@"\nwhile [ "$1" != --out ]; do shift; done\n'
        f'cp {tmp_path}/cut/run.jsonl "$2"\nexit 143\n',
        encoding="utf-8",
    )
    tool.chmod(0o755)
    env = dict(os.environ) | {"LORA_HARNESS_VENV": str(tmp_path / ".venv"), "LORA_NIGHTS": str(tmp_path / "nights")}
    script = next(block for block in blocks("bash") if block.startswith("#!"))
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 143
    page = Path(done.stdout.splitlines()[0].rpartition(": ")[2])
    assert "cut short" in page.read_text(encoding="utf-8")
    assert "cut short" in done.stdout


def test_every_night_draws_the_tests_at_random_and_keeps_what_they_print() -> None:
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8"))["jobs"]["run"]
    (step,) = (step for step in steps["steps"] if "make test" in step.get("run", ""))
    assert step["env"] == {"HYPOTHESIS_PROFILE": "random"}
    assert "reports/out/" in step["run"]
    assert "pipefail" in step["run"]
