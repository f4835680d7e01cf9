from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pydantic
import pytest
from click.testing import CliRunner
from report_samples import failed, header, night, passed

from harness.cli import main as cli
from harness.report.models import PartRecord
from harness.report.schema import main, run_schema
from harness.verdict.file_record import FileRecord

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "reports" / "schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(run_schema())
    return jsonschema.Draft202012Validator(run_schema())


@pytest.mark.skipif(pydantic.VERSION.startswith("2.8."), reason="pydantic 2.8 words some fields of a schema otherwise")
def test_the_committed_schema_is_up_to_date() -> None:
    assert json.loads(COMMITTED.read_text(encoding="utf-8")) == run_schema(), (
        "run: python -m harness.report.schema reports/schema.json"
    )


def test_every_line_of_a_run_validates(tmp_path: Path, validator: jsonschema.Draft202012Validator) -> None:
    night(tmp_path)
    for line in (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines():
        validator.validate(json.loads(line))


@pytest.mark.parametrize("record", [header(), passed(ratio=float("nan")), PartRecord(name="x", measured=True)])
def test_numbers_that_json_lacks_validate_as_strings(
    record: object, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(json.loads(record.model_dump_json()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change", [{"outcome": "fine"}, {"ratio": "half"}, {"surprise": 1}, {"kind": "verdikt"}, {"loader": None}]
)
def test_a_line_that_is_wrong_does_not_validate(
    change: dict[str, object], validator: jsonschema.Draft202012Validator
) -> None:
    line = json.loads(failed().model_dump_json()) | change
    assert not validator.is_valid(line)


def test_what_inspect_and_audit_print_validates(tmp_path: Path, validator: jsonschema.Draft202012Validator) -> None:
    loras = ROOT / "fixtures" / "loras"
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"x")
    for arguments, kinds in (
        (["inspect", str(loras / "r8_a16" / "kohya.safetensors"), "--energy", str(bad)], ["file"] * 2),
        (["audit", str(loras / "r8_a16"), "--energy", "-j", "0", str(bad)], ["header", *["file"] * 5, "footer"]),
    ):
        lines = [json.loads(line) for line in CliRunner().invoke(cli, [*arguments, "--json"]).stdout.splitlines()]
        assert [line["kind"] for line in lines] == kinds
        for line in lines:
            validator.validate(line)


@pytest.mark.parametrize(
    "change", [{"modules": "many"}, {"ranks": [4]}, {"hazards": [{"code": 1}]}, {"energy": 0.5}, {"surprise": 1}]
)
def test_every_field_of_a_file_record_has_a_type(
    change: dict[str, object], validator: jsonschema.Draft202012Validator
) -> None:
    line = json.loads(FileRecord(path="x").model_dump_json())
    assert validator.is_valid(line)
    assert not validator.is_valid(line | change)


def test_the_schema_can_be_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "schema.json")]) == 0
    assert main([]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "schema.json").read_text(encoding="utf-8"))
