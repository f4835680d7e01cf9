"""`report` of a run that was cut says so and exits 1, whichever form it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.commands.report import command
from harness.report.models import Header
from harness.report.records import RunWriter
from harness.verdict.verdict import Verdict


def run_file(folder: Path, *, whole: bool) -> Path:
    path = folder / f"{whole}.jsonl"
    with RunWriter(path, Header(run_id=str(whole), created="2026-11-26T00:00:00+00:00", command="c")) as writer:
        writer.write(Verdict(loader="x", check="scale", outcome="passed", format="kohya", bench="b"))
    if not whole:
        path.write_text(path.read_text(encoding="utf-8").rpartition('{"kind":"footer"')[0], encoding="utf-8")
    return path


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_a_cut_run_exits_1_and_says_why(form: list[str], tmp_path: Path) -> None:
    cut, whole = (run_file(tmp_path, whole=whole) for whole in (False, True))
    for paths, code in (([whole], 0), ([cut], 1), ([whole, cut], 1)):
        done = CliRunner().invoke(command, [*map(str, paths), "--out", str(tmp_path / "out"), *form])
        assert done.exit_code == code, done.output
        assert ("cut short: " in done.output) == bool(code)
        assert done.stdout.strip()
