from __future__ import annotations

import json
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from report_samples import HOSTILE, failed, file_records, matrix_records, passed, run_of, skipped

from harness.report.ci import (
    code,
    escape,
    github_annotations,
    matrix_markdown,
    sarif,
    step_summary,
    workflow_command,
    write_sarif,
    write_step_summary,
)
from harness.report.gates import GateResult
from harness.verdict.file_record import FileRecord, Hazard

TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
ARTIFACT = {"type": "object", "required": ["uri"], "properties": {"uri": {"type": "string", "format": "uri-reference"}}}
RULE = {
    "type": "object",
    "required": ["id"],
    "properties": {"id": {"type": "string"}, "shortDescription": TEXT, "help": TEXT},
}
RESULT = {
    "type": "object",
    "required": ["message", "ruleId", "locations"],
    "properties": {
        "message": TEXT,
        "level": LEVEL,
        "ruleIndex": {"type": "integer", "minimum": 0},
        "locations": {
            "type": "array",
            "items": {
                "required": ["physicalLocation"],
                "properties": {"physicalLocation": {"properties": {"artifactLocation": ARTIFACT}}},
            },
        },
    },
}
DRIVER = {"required": ["name"], "properties": {"name": {"type": "string"}, "rules": {"type": "array", "items": RULE}}}
SARIF = {  # what section 3 of the standard requires of the parts that we write
    "type": "object",
    "required": ["version", "runs"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string"},
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "required": ["tool"],
                "properties": {
                    "tool": {"required": ["driver"], "properties": {"driver": DRIVER}},
                    "invocations": {"items": {"required": ["executionSuccessful"]}},
                    "results": {"type": "array", "items": RESULT},
                },
            },
        },
    },
}


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")


def test_outside_actions_there_are_no_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert github_annotations(run_of(failed())) == []


@pytest.mark.usefixtures("actions")
def test_each_cause_is_one_error_and_each_skip_one_warning() -> None:
    lines = github_annotations(run_of(failed(), failed(format="peft"), passed(), skipped("diffusers")))
    assert len(lines) == 2
    assert lines[0].startswith("::error title=diffsynth-2.0.4%3A alpha ignored (LH202)::LH202 alpha ignored: ")
    assert "%0A  loader" in lines[0]
    assert lines[1] == "::warning title=not measured%3A diffusers merge on cuda::no CUDA device"


@pytest.mark.usefixtures("actions")
def test_a_closed_gate_is_an_error() -> None:
    gate = [GateResult("lost coverage", "peft kohya", "not measured now")]
    assert github_annotations(run_of(passed()), gate)[0].startswith("::error title=lost coverage::lost coverage: ")


def test_commands_escape_what_the_runner_would_read() -> None:
    line = workflow_command("error", "100%\r\n::set-output name=x::y", title="a:b,c%\n", file=None)
    assert line == "::error title=a%3Ab%2Cc%25%0A::100%25\\r%0A::set-output name=x::y"
    assert "\n" not in line


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_on_its_line(text: str) -> None:
    assert len(workflow_command("error", text, title=text).splitlines()) == 1


def rendered(text: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(text)


def test_the_matrix_is_a_markdown_table_with_the_law() -> None:
    table = matrix_markdown(run_of(*matrix_records()))  # type: ignore[arg-type]
    assert "| raw\\_alpha.py:load | qwen-image | ✕ wrong `strength · alpha` |" in table
    html = rendered(table)
    assert html.count("<tr>") == 1 + 10
    assert html.count("<td") == 10 * 6


@pytest.mark.parametrize("text", [*HOSTILE, "a|b", "`tick`", "**bold**", "[x](http://x)", "![i](x)", "# head", "@team"])
def test_hostile_text_renders_as_text_in_markdown(text: str) -> None:
    html = rendered(step_summary(run_of(failed(text, title=text, format=text, rows=(("worst", text),)), passed())))
    for tag in ("<script", "<img", "<svg", "<strong", "<a ", "<h1"):
        assert tag not in html
    assert "<table>" in html


def test_escapes_keep_the_words() -> None:
    assert rendered(escape("a_b|c `d`\ne")) == "<p>a_b|c `d` e</p>\n"
    assert rendered(code("a`b")) == "<p><code>a`b</code></p>\n"


def test_the_summary_is_appended_to_the_file_that_actions_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert not write_step_summary(run_of(passed()))
    target = tmp_path / "summary.md"
    target.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(target))
    assert write_step_summary(run_of(failed()))
    text = target.read_text(encoding="utf-8")
    assert text.startswith("before\n## The loader does not reproduce the training.")
    assert failed().text() in text


def test_sarif_has_a_result_per_hazard_with_its_rule_and_file(tmp_path: Path) -> None:
    odd = FileRecord(path="dir with space/a\x1b.safetensors", hazards=(Hazard(code="LH799", what="cut \x1b[31m"),))
    log = json.loads(write_sarif(run_of(*file_records(), odd), tmp_path / "audit.sarif").read_text(encoding="utf-8"))
    (run,) = log["runs"]
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [("LH703", "warning"), ("LH799", "error")]
    rules = run["tool"]["driver"]["rules"]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in run["results"])
    uri = run["results"][1]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "dir%20with%20space/a%1B.safetensors"
    assert "\x1b" not in run["results"][1]["message"]["text"]


def test_sarif_fits_the_published_structure() -> None:
    import jsonschema

    log = sarif(run_of(*file_records()))
    jsonschema.validate(log, SARIF)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(log | {"version": "3"}, SARIF)
    del log["runs"][0]["results"][0]["message"]["text"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(log, SARIF)


def test_a_cut_audit_is_no_successful_execution() -> None:
    run = run_of(*file_records())
    cut = type(run)(run.header, run.records, None)
    assert sarif(cut)["runs"][0]["invocations"][0]["executionSuccessful"] is False
