from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from report_samples import failed, header, night, passed

from harness.report.records import PartRecord
from harness.report.schema import main, run_schema

COMMITTED = Path(__file__).parents[2] / "reports" / "schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(run_schema())
    return jsonschema.Draft202012Validator(run_schema())


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


def test_the_schema_can_be_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "schema.json")]) == 0
    assert main([]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "schema.json").read_text(encoding="utf-8"))
