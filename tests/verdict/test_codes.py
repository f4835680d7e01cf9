"""What a code says of itself is what happens: who emits it, which exit code and SARIF level it leads to."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner

import harness
from fixtures.build_malformed import kohya, tensors_file
from harness.cli import main
from harness.report.ci import sarif
from harness.report.models import Footer, Header
from harness.report.records import Run
from harness.verdict.codes import CODES, Check
from harness.verdict.file_record import FileRecord, Hazard

PACKAGE = Path(harness.__file__).parent
LAWS = {code for code in CODES if code.startswith("LH2")}  # the engine of the laws names them for all who measure
LOADERS = set(get_args(Check)) - {"images", "verify", "inspect"}
SOURCES = {
    "check": (("checks", "law", "isolation"), LOADERS),
    "images": (("images",), {"images"}),
    "verify": (("doctor/verify",), {"verify"}),
    "inspect": (("doctor/inspect", "doctor/audit", "files"), {"inspect"}),
}


def literals(tree: ast.AST) -> Iterator[str]:
    """Yield the codes that stand in a module as strings of their own, those that are only compared left out."""
    compared = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in compared:
            yield from re.findall(r"^LH\d{3}$", node.value)


def emitted(folders: tuple[str, ...]) -> set[str]:
    files = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    assert files
    return {code for path in files for code in literals(ast.parse(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("name", SOURCES)
def test_a_code_names_the_checks_whose_source_emits_it(name: str) -> None:
    folders, checks = SOURCES[name]
    declared = {code for code, about in CODES.items() if checks & set(about.checks)}
    assert emitted(folders) - LAWS == declared - LAWS
    assert emitted((*folders, "law")) & LAWS >= declared & LAWS


def test_every_code_is_emitted_by_a_check_and_explains_codes_that_exist() -> None:
    for code in CODES.values():
        assert code.checks
        assert set(code.checks) <= set(get_args(Check))
        assert set(code.explains) <= set(CODES) - {code.code}


def library(folder: Path, entries: dict[str, object], metadata: dict[str, object]) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(tensors_file(entries, metadata))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("metadata", "code", "exits", "level"),
    [({"ss_network_alpha": "16"}, "LH711", 1, "error"), ({}, "LH708", 0, "warning")],
)
def test_inspect_audit_and_sarif_agree_on_how_grave_a_hazard_is(
    tmp_path: Path, metadata: dict[str, object], code: str, exits: int, level: str
) -> None:
    more = {"lora_unet_x.scale": kohya()["lora_unet_x.alpha"]} if code == "LH708" else {}
    path = library(tmp_path, kohya() | more, metadata)  # type: ignore[arg-type]
    done = CliRunner().invoke(main, ["inspect", str(path), "--sarif", str(tmp_path / "out.sarif")])
    results = json.loads((tmp_path / "out.sarif").read_text(encoding="utf-8"))["runs"][0]["results"]
    assert [(result["ruleId"], result["level"]) for result in results] == [(code, level)]
    assert done.exit_code == exits
    assert CliRunner().invoke(main, ["audit", str(path), "-j", "0"]).exit_code == exits
    assert CliRunner().invoke(main, ["inspect", str(path), "--strict"]).exit_code == 1


@pytest.mark.parametrize("code", [*(code for code, about in CODES.items() if "inspect" in about.checks), "LH798"])
def test_the_level_in_sarif_is_the_severity_of_the_code(code: str) -> None:
    record = FileRecord(path="x", hazards=(Hazard(code="LH701"), Hazard(code=code)))
    log = sarif(Run(Header(run_id="x", created="", command=""), (record,), Footer(counts={}, seconds=0, exit_code=0)))
    known = CODES.get(code)
    grave = known is not None and known.severity != "warning"
    assert log["runs"][0]["results"][1]["level"] == ("error" if grave else "warning")
    assert record.severity == (known.severity if known else "warning")


def test_explain_says_how_grave_a_code_is_and_who_emits_it() -> None:
    text = CliRunner().invoke(main, ["explain", "LH103"]).output
    assert "severity  error\n" in text
    assert "checks    silence, verify\n" in text
    facts = json.loads(CliRunner().invoke(main, ["explain", "LH104", "--json"]).output)
    assert (facts["severity"], facts["checks"]) == ("error", ["direction", "verify"])
    assert "LH102" in facts["explains"]


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_explained_with_a_wrong_and_a_right_example(code: str) -> None:
    found = json.loads(CliRunner().invoke(main, ["explain", code, "--json"]).output)
    assert found["wrong"].strip() != found["right"].strip()
    assert found["cause"]
    assert found["fix"]


@pytest.mark.parametrize(
    "symptom", ["noise", "no effect", "the lora doesn't work", "it does nothing", "burnt", "black image", "too strong"]
)
def test_a_symptom_leads_to_codes_that_there_are(symptom: str) -> None:
    found = json.loads(CliRunner().invoke(main, ["explain", *symptom.split(), "--json"]).output)
    assert found["codes"]
    assert set(found["codes"]) <= CODES.keys()


@pytest.mark.parametrize(("typed", "meant"), [("nioise", "noise"), ("LH2O1", "LH201"), ("comfyui-header", "comfyui-")])
def test_what_was_mistyped_is_asked_back(typed: str, meant: str) -> None:
    done = CliRunner().invoke(main, ["explain", typed])
    assert done.exit_code == 2
    assert f"did you mean {meant}" in done.output
