"""Text out of a record, a file or an exception makes no line, no command and no markup of its own."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_samples import failed, run_of
from rich.console import Console

from harness.commands.screen import WithoutCommands
from harness.report.ci import github_annotations, step_summary, write_sarif
from harness.report.gates import GateResult
from harness.report.history import append_history, history_text, read_history
from harness.report.html import write_report
from harness.report.models import PartRecord
from harness.report.terminal import print_run
from harness.verdict.file_record import FileRecord, Hazard
from harness.verdict.verdict import LawRecord

ROOT = Path(__file__).parents[2]
NASTY = "x\n::error::forged\r\n::set-output name=a::b\x1b[2J\u202e\u2028::stop-commands::x\x85##[error]|`</script><b>"
LINES = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def hostile():
    law = LawRecord(formula=NASTY, name=NASTY, alternatives=(NASTY,))
    verdict = failed(
        NASTY, title=NASTY, worst_module=NASTY, reason=NASTY, reproduce=NASTY, loader_version=NASTY, format=NASTY,
        bench=NASTY, variant=NASTY, rows=((NASTY, NASTY),), law=law,
    )  # fmt: skip
    part = PartRecord(name=NASTY, measured=False, reason=NASTY)
    file = FileRecord(path=NASTY, trainer=NASTY, hazards=(Hazard(code=NASTY, what=NASTY),))
    header = {"planned": (NASTY,), "command": NASTY, "machine": NASTY, "commit": NASTY, "device": NASTY}
    return run_of(verdict, part, file, **header)


def lines(text: str) -> list[str]:
    for character in LINES:
        text = text.replace(character, "\n")
    return text.split("\n")


def harmless(text: str) -> None:
    assert not [line for line in lines(text) if line.lstrip().startswith(("::", "x"))]
    assert not [character for character in text if character in "\x1b\u202e\r"]


def test_a_foreign_run_forges_no_line_of_the_terminal() -> None:
    out = io.StringIO()
    print_run(hostile(), Console(file=out, width=200))
    text = out.getvalue()
    assert "forged" in text
    assert not [character for character in text if character in "\x1b\u202e\r\u2028\x85"]
    assert not [line for line in text.split("\n") if line.lstrip().startswith("::")]


def test_a_foreign_history_forges_no_line(tmp_path: Path) -> None:
    append_history(tmp_path / "history.jsonl", hostile())
    assert len(history_text(read_history(tmp_path / "history.jsonl")).split("\n")) == 1


def test_a_result_of_a_gate_is_one_line() -> None:
    assert len(lines(GateResult(NASTY, NASTY, NASTY).text())) == 1


def test_an_annotation_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for line in github_annotations(hostile(), [GateResult(NASTY, NASTY, NASTY)]):
        assert line.startswith(("::error", "::warning"))
        assert len(lines(line)) == 1


def test_the_step_summary_shows_text_as_text() -> None:
    text = step_summary(hostile(), [GateResult(NASTY, NASTY, NASTY)])
    assert not [line for line in lines(text) if line.lstrip().startswith("::")]
    told = [line for line in lines(text) if line.startswith(("#", "- "))]
    assert any("forged" in line for line in told)
    assert not [line for line in told if re.search(r"(?<!\\)[<`]", line)]


def test_sarif_is_json_whatever_a_file_is_called(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.safetensors")
    run = run_of(FileRecord(path=odd, hazards=(Hazard(code="LH799", what=NASTY + "\ud800"),)))
    log = json.loads(write_sarif(run, tmp_path / "log.sarif").read_text())
    assert (
        log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        == "%FF%FE.safetensors"
    )


def test_a_page_of_a_foreign_run_holds_its_text_as_text(tmp_path: Path) -> None:
    page = write_report([hostile()], tmp_path).read_text(encoding="utf-8")
    assert "</script><b>" not in page
    assert not [character for character in page if character in "\x1b\u202e"]


COMMANDS = {
    "::error::x\n": "\\u003a:error::x\n",
    "  ::error::x": "  \\u003a:error::x",
    "a\n\t::x\rb": "a\n\t\\u003a:x\rb",
    "a ::x": "a ::x",
    "say ##[error]x": "say ##\\u005berror]x",
    "std::vector": "std::vector",
}


@pytest.mark.parametrize("text", COMMANDS)
def test_what_is_printed_is_no_command(text: str) -> None:
    WithoutCommands(stream := io.StringIO()).write(text)
    assert stream.getvalue() == COMMANDS[text]


def test_a_line_that_is_written_in_pieces_is_one_line() -> None:
    out = WithoutCommands(stream := io.StringIO())
    for piece in ("std", "::vector\n", "  ", "::error::x\n"):
        out.write(piece)
    assert stream.getvalue() == "std::vector\n  \\u003a:error::x\n"


def test_the_name_of_a_file_commands_no_runner(tmp_path: Path) -> None:
    file = tmp_path / "::error::forged.safetensors"
    file.write_bytes(b"\xff" * 40)
    command = [sys.executable, "-m", "harness", "inspect", file.name]
    environment = {**os.environ, "GITHUB_ACTIONS": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert "forged" in done.stdout
    harmless(done.stdout + done.stderr)


def test_junit_stays_well_formed_whatever_a_loader_raises(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"def load(model, lora, *, strength=1.0):\n    raise KeyError({NASTY + chr(0)!r})\n"
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "harness.suite"]
    options = [f"--junitxml={junit}", f"--lora-loader={tmp_path / 'mine.py'}:load", "--lora-max-examples=1"]
    done = subprocess.run(
        [*command, *options, "-k", "kohya-qwen-image-smoke"], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "LH901" in ElementTree.parse(junit).getroot().find(".//failure").text  # type: ignore[union-attr,operator]
    assert not [line for line in lines(done.stdout) if line.lstrip().startswith("::")]
