"""A verdict's first line stands alone, its rows line up, and only good outcomes leave a run green."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from harness.verdict.verdict import LawRecord, Verdict


def verdict(**fields: object) -> Verdict:
    return Verdict.model_validate({"loader": "mine", "check": "scale", "outcome": "failed"} | fields)


@pytest.mark.parametrize(
    ("outcome", "green"),
    [("passed", True), ("skipped", True), ("xfailed", True), ("failed", False), ("errored", False), ("xpassed", False)],
)
def test_only_these_outcomes_leave_a_run_green(outcome: str, green: bool) -> None:
    assert verdict(outcome=outcome).ok is green


def test_the_text_is_a_line_that_stands_alone_and_rows_in_columns() -> None:
    rows = (("law", "strength"), ("expected", "2.0"))
    found = verdict(code="LH202", title="alpha ignored", rows=rows).text()
    assert found == "LH202 alpha ignored\n  law       strength\n  expected  2.0"


def test_without_title_the_check_and_its_outcome_speak() -> None:
    assert verdict().text() == "scale: failed"
    assert verdict(code="LH901").text() == "LH901 scale: failed"
    assert verdict(title="too strong").text() == "too strong"


def test_what_was_not_measured_is_left_open() -> None:
    plain = verdict()
    assert (plain.kind, plain.variant, plain.rows, plain.data) == ("verdict", "lora", (), {})
    assert plain.measured_scale is plain.law is plain.code is None
    law = LawRecord(formula="strength", name="alpha ignored")
    assert (law.ambiguous, law.alternatives, law.exponents) == (False, (), {})


def test_a_verdict_cannot_be_changed_and_takes_no_unknown_field() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        verdict().outcome = "passed"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="ratios"):
        verdict(ratios=2.0)


def test_a_verdict_survives_json_even_where_a_number_is_infinite() -> None:
    written = verdict(ratio=float("inf"), measured_scale=2.0, law=LawRecord(formula="1", name="x", constant=0.5))
    assert Verdict.model_validate_json(written.model_dump_json()) == written
    assert Verdict.model_validate(written.model_dump(mode="json")) == written
