"""The command line: what it prints, its exit codes, and that bad input costs one clear sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner, Result

from harness.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
RAW = str(ROOT / "examples" / "raw_alpha.py") + ":load"
LORA = str(ROOT / "fixtures" / "loras" / "r8_a16" / "kohya.safetensors")
QUICK = ["--format", "kohya", "--bench", "qwen-image", "--max-examples", "15", "-j", "1"]


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def failure(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"lora-harness {name}" in result.output.partition("Example")[2]


def test_help_and_inspect_import_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from harness.cli import main;"
        f"r = [CliRunner().invoke(main, a).exit_code for a in (['--help'], ['inspect', {LORA!r}])];"
        "print(r, [m for m in ('torch', 'peft', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[0, 0] []"


def test_a_right_loader_exits_0() -> None:
    args = ("--bench", "qwen-image", "--variant", "lora", "--max-examples", "10", "-j", "1")
    result = run("check", "peft", *args, "--known-failures", "shipped")
    assert result.exit_code == 0, result.output


def test_raw_alpha_exits_1_with_its_code_and_formula() -> None:
    result = run("check", RAW, *QUICK)
    assert result.exit_code == 1
    assert "\nLH201 alpha not divided by rank: delta is" in result.output
    assert "strength * alpha" in result.output


def test_the_reproduce_line_fails_the_same_way() -> None:
    first = run("check", RAW, *QUICK, "--json")
    verdict = next(v for v in map(json.loads, first.stdout.splitlines()) if v.get("outcome") == "failed")
    command = verdict["reproduce"].split()
    assert command[:2] == ["lora-harness", "check"]
    again = run(*command[1:], "--json")
    repeated = next(v for v in map(json.loads, again.stdout.splitlines()) if v.get("outcome") == "failed")
    same = ("code", "measured_scale", "expected_scale", "worst_module", "counterexample", "reproduce")
    assert [repeated[key] for key in same] == [verdict[key] for key in same]


def test_rank_and_alpha_can_be_pinned() -> None:
    result = run("check", RAW, "--format", "kohya", "--bench", "qwen-image", "--rank", "4", "--alpha", "8", "-j", "1")
    assert result.exit_code == 1
    assert "rank 4, alpha 8" in result.output


def test_json_lines_have_header_verdicts_and_footer_and_fit_the_schema() -> None:
    result = run("check", RAW, *QUICK, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    schema = json.loads((ROOT / "reports" / "schema.json").read_text())
    for line in lines:
        jsonschema.validate(line, schema)
    assert [lines[0]["kind"], lines[-1]["kind"]] == ["header", "footer"]
    assert {line["kind"] for line in lines[1:-1]} == {"verdict"}
    assert lines[-1]["exit_code"] == 1


def test_explain_and_loaders_answer() -> None:
    assert "divide" in run("explain", "lh201").output
    assert "peft" in run("loaders").output
    assert json.loads(run("explain", "LH201", "--json").stdout)["code"] == "LH201"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["check", "nope"], "nope"),
        (["check", "no/such/file.py:load"], "no/such/file.py"),
        (["check", "json:nothing"], "nothing"),
        (["check", "json:__name__"], "__name__"),
        (["check", "peft", "--format", "nope"], "format='nope'"),
        (["check", "peft", "--bench", "nope"], "bench='nope'"),
        (["check", "peft", "--bench", "qwen-image", "--module", "gone=4:8"], "module='gone'"),
        (["check", "peft", "--module", "x"], "NAME=RANK:ALPHA"),
        (["check", "peft", "--known-failures", "gone.toml"], "gone.toml"),
        (["explain", "LH000"], "LH000"),
        (["inspect", LORA, "--base", "gone"], "gone"),
        (["report", "gone.jsonl"], "gone.jsonl"),
        (["nope"], "Commands are run, check"),
        (["sweep", "peft", "--alphas", "a,b"], "numbers separated by commas"),
        (["sweep", "peft", "--pipeline", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_2(args: list[str], words: str) -> None:
    assert words in failure(run(*args))


def test_an_unreadable_file_does_not_stop_the_others(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    result = run("inspect", "--json", str(bad), LORA)
    first, second = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 2
    assert [hazard["code"] for hazard in first["hazards"]] == ["LH799"]
    assert second["format"] == "kohya"
    assert second["ranks"] == {"8": 40}


def test_inspect_writes_sarif_for_code_scanning(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"x")
    run("inspect", str(bad), LORA, "--sarif", str(tmp_path / "out.sarif"))
    log = json.loads((tmp_path / "out.sarif").read_text())
    assert log["version"] == "2.1.0"
    assert [result["ruleId"] for result in log["runs"][0]["results"]] == ["LH799"]


@pytest.mark.images
@pytest.mark.parametrize(
    "args", [["sweep"], ["run", "--quick", "--max-examples", "1", "-j", "1", "--loader"]], ids=["sweep", "run"]
)
def test_a_loader_that_ends_the_process_is_red_and_has_its_page(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text(
        "import os\nfrom harness import loader\n@loader(formats={'peft'}, benches={'qwen-image'})\n"
        "def load(model, lora, *, strength=1.0):\n    os._exit(0)\n"
    )
    command = [sys.executable, "-m", "harness", *args, f"{tmp_path}/exits.py:load", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"exit status 0 \([^)]* at 0\)", (tmp_path / "out" / "run.jsonl").read_text(encoding="utf-8"))
    assert "LH901" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
