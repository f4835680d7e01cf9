"""What the benchmarks say of tools is what the tools said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("benchmarks")

from benchmarks.peers import Case, Ran, Tool, asked, by_code, graded, our_norms, sentrys_norms

NORMS = {"model.layers.0.self_attn.q_proj": 2.0, "model.layers.0.mlp.up_proj": 3.0}


def said(code: int = 0, text: str = "") -> Ran:
    return Ran(code, text, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("code", "grades"), [(0, (True, False)), (1, (False, True)), (2, (None, None))])
def test_an_exit_code_is_right_wrong_or_no_answer(code: int, grades: tuple[bool | None, bool | None]) -> None:
    tool = Tool("", lambda at: [], by_code)
    assert tuple(graded(tool, said(code), Case("", {}, right)) for right in (True, False)) == grades


def test_norms_are_right_when_all_are_there_and_close() -> None:
    case = Case("", {}, NORMS)
    for found, grade in (
        ({name: norm * 1.0005 for name, norm in NORMS.items()}, True),
        ({**NORMS, "model.layers.0.mlp.up_proj": 6.0}, False),
        ({"model.layers.0.mlp.up_proj": 3.0}, False),
        (None, None),
    ):
        assert graded(Tool("", lambda at: [], lambda ran, found=found: found), said(), case) is grade  # type: ignore[misc]


def test_output_that_is_no_answer_is_none() -> None:
    for answer in (our_norms, sentrys_norms):
        for text in ("", "no such file", "{}", "[]"):
            assert graded(Tool("", lambda at: [], answer), said(text=text), Case("", {}, NORMS)) is None


def test_adaptersentrys_mean_square_becomes_a_norm() -> None:
    module = '{"layer": 0, "kind": "mlp", "module": "up_proj", "shape_a": [4, 9], "shape_b": [16, 4], "features": %s}'
    found = sentrys_norms(said(text='{"modules": [%s]}' % (module % '{"log_rms": 0.0}')))
    assert found == {"model.layers.0.mlp.up_proj": 12.0}


def test_every_tool_has_a_row_and_one_that_is_missing_says_so(tmp_path: Path) -> None:
    there = Tool("there", lambda at: [sys.executable, "-c", f"raise SystemExit({at['code']})"], by_code)
    missing = Tool("missing", lambda at: [str(tmp_path / "python")], by_code)
    cases = [Case("right", {"code": Path("0")}, True), Case("wrong", {"code": Path("0")}, False)]
    rows = list(asked("is it?", [there, missing], cases, tmp_path))
    assert rows[0][:5] == ["is it?", "there", "1 of 2", "wrong", "0"]
    assert float(rows[0][7]) > 0
    assert rows[1][:3] == ["is it?", "missing", "not installed here"]


def test_the_document_on_pictures_keeps_its_prose_and_gets_every_section_anew(tmp_path: Path) -> None:
    from benchmarks.image_power import written

    (tmp_path / "power.md").write_text("# Head\n\nprose\n\n## Old\n\nx\n\n## In turns\n\ny\n", encoding="utf-8")
    written(tmp_path / "power.md", ["## First\n\n1", "\n## Second\n\n2\n"])
    assert (tmp_path / "power.md").read_text(encoding="utf-8") == "# Head\n\nprose\n\n## First\n\n1\n\n## Second\n\n2\n"
