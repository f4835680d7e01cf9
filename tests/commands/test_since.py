"""`run --since`: what has not changed is carried over, marked as such, and never decides a gate."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.cli import main
from harness.errors import UserError
from harness.report.gates import compare
from harness.report.html import write_report
from harness.report.models import CellRecord, Footer, Header, ProbeRecord
from harness.report.records import Run, read_run
from harness.report.since import Earlier, carried_sentence
from harness.verdict.verdict import Carried, Verdict

PLACE = ("l", "peft", "qwen-image", "lora")
CHECKS = frozenset({"scale", "smoke", "known_failures"})
EARLIER = Header(run_id="first", created="2026-01-02T03:04:05+00:00", command="lora-harness run")
TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def verdict(check: str = "scale", outcome: str = "passed", **more: object) -> Verdict:
    return Verdict.model_validate(
        {"loader": "l", "check": check, "outcome": outcome, "format": "peft", "bench": "qwen-image"} | more
    )


def cell(fingerprint: str | None = "a") -> CellRecord:
    return CellRecord(loader="l", format="peft", bench="qwen-image", fingerprint=fingerprint)


def earlier(*records: object) -> Earlier:
    return Earlier(Run(EARLIER, tuple(records), Footer(counts={}, seconds=1.0, exit_code=0)), CHECKS)  # type: ignore[arg-type]


def test_an_unchanged_cell_is_carried_over_with_run_and_time() -> None:
    probes = ProbeRecord(loader="l", format="peft", bench="qwen-image", law=None, points=())
    found = earlier(verdict(), verdict("smoke"), probes, cell()).still_holds({PLACE: "a"})[PLACE]
    carried = [record.carried for record in found if isinstance(record, Verdict)]
    assert carried == [Carried(run="first", measured=EARLIER.created)] * 2
    assert found[2:] == [probes, cell()]


def test_what_was_carried_before_keeps_when_it_was_measured() -> None:
    before = Carried(run="zeroth", measured="2025-12-31T00:00:00+00:00")
    (found, _) = earlier(verdict(carried=before), cell()).still_holds({PLACE: "a"})[PLACE]
    assert isinstance(found, Verdict)
    assert found.carried == before


@pytest.mark.parametrize(
    ("records", "now"),
    [
        ((verdict(), cell()), "b"),
        ((verdict(), cell()), None),
        ((verdict(), cell(None)), None),
        ((verdict(),), "a"),
        ((cell(),), "a"),
        ((verdict("images"), cell()), "a"),
        ((verdict(), verdict("smoke", "errored"), cell()), "a"),
        ((verdict("known_failures", "xpassed"), cell()), "a"),
        ((verdict(variant="dora"), cell()), "a"),
    ],
    ids=[
        "changed",
        "unknown",
        "never known",
        "not finished",
        "no verdict",
        "pictures",
        "errored",
        "xpassed",
        "variant",
    ],
)
def test_a_cell_that_may_have_changed_or_was_not_finished_is_measured_again(
    records: tuple[object, ...], now: str | None
) -> None:
    assert earlier(*records).still_holds({PLACE: now}) == {}


def carried_run(**more: object) -> Run:
    told = verdict(carried={"run": "first", "measured": EARLIER.created}, **more)
    return Run(
        EARLIER.model_copy(update={"run_id": "second"}), (told, cell()), Footer(counts={}, seconds=1.0, exit_code=0)
    )


def test_a_gate_refuses_carried_verdicts_on_either_side() -> None:
    whole = replace(carried_run(), records=(verdict(),))
    assert compare(whole, whole) == []
    for pair in ((whole, carried_run()), (carried_run(), whole)):
        with pytest.raises(UserError, match="1 of its cells were carried over"):
            compare(*pair)


def test_the_sentence_says_how_many_from_which_run_and_when() -> None:
    said = "Carried over, not measured again: 1 cell from run first, measured 2026-01-02T03:04:05+00:00."
    assert carried_sentence(carried_run()) == said
    assert carried_sentence(replace(carried_run(), records=(verdict(),))) == ""


def test_the_page_marks_what_was_carried_over_and_shows_its_text_as_text(tmp_path: Path) -> None:
    run = carried_run()
    hostile = verdict("smoke", carried={"run": "<script>x</script>", "measured": "<b>"})
    page = write_report([replace(run, records=(*run.records, hostile), folder=tmp_path)], tmp_path).read_text()
    assert "carried over, not measured again: run first, measured 2026-01-02T03:04:05+00:00" in page
    assert "<script>x" not in page


def test_since_and_baseline_are_bad_usage_together(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    run.write_text(EARLIER.model_dump_json() + "\n")
    done = CliRunner().invoke(
        main, ["run", "--since", str(run), "--baseline", str(run), "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
    assert "--since carries verdicts over, and a gate needs all measured" in done.output
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    run.write_text("{}\n")
    done = CliRunner().invoke(main, ["run", "--since", str(run), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert str(run) in done.output
    assert not (tmp_path / "out").exists()


@TORCH
def test_a_fingerprint_changes_with_what_verdicts_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.checks import fingerprint as module
    from harness.checks.cell import Cell
    from harness.checks.fingerprint import fingerprint
    from harness.checks.plan import Plan
    from harness.isolation.limits import Limits
    from harness.loaders.registry import resolve

    pytest.importorskip("loralib")
    one = Cell(resolve("loralib"), "kohya", "qwen-image")
    plan, limits = Plan(10), Limits()
    first = fingerprint(one, plan, limits)
    assert first == fingerprint(one, plan, limits)
    others = [
        fingerprint(replace(one, bench_name="qwen-image-fused"), plan, limits),
        fingerprint(replace(one, format="peft"), plan, limits),
        fingerprint(replace(one, subject=replace(one.subject, version="0")), plan, limits),
        fingerprint(one, replace(plan, seed=1), limits),
        fingerprint(one, replace(plan, max_examples=11), limits),
        fingerprint(one, plan, replace(limits, seconds=1.0)),
    ]
    monkeypatch.setattr(module, "_harness", lambda: {"source": "another", "needs": {}})
    others.append(fingerprint(one, plan, limits))
    assert None not in others
    assert len({first, *others}) == len(others) + 1
    monkeypatch.setattr(module, "_harness", lambda: {"source": "another", "needs": None})
    assert fingerprint(one, plan, limits) is None


@TORCH
@pytest.mark.parametrize("spec", ["x.py:load", "serve:python x.py", "cmd:python x.py {base} {out}", "package"])
def test_code_of_the_users_own_is_never_taken_as_unchanged(spec: str) -> None:
    from harness.checks.cell import Cell
    from harness.checks.fingerprint import fingerprint
    from harness.checks.plan import Plan
    from harness.isolation.limits import Limits
    from harness.loaders.apart import subject_here

    subject = subject_here(lambda model, lora, *, strength=1.0: None, spec, "1")
    assert fingerprint(Cell(subject, "kohya", "qwen-image"), Plan(10), Limits()) is None


@TORCH
def test_a_package_in_a_folder_can_change_without_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.checks import fingerprint
    from harness.checks.fingerprint import _closure

    whole = _closure(["loralib"])
    assert whole is not None
    held = metadata.distribution

    class Editable:
        version, requires = "1", ()

        def read_text(self, name: str) -> str:
            return '{"dir_info": {"editable": true}}'

    monkeypatch.setattr(fingerprint, "_held", fingerprint._held.__wrapped__)
    monkeypatch.setattr(metadata, "distribution", lambda name: Editable() if name == "loralib" else held(name))
    assert _closure(["loralib"]) is None


@TORCH
def test_a_second_run_measures_only_what_changed(tmp_path: Path) -> None:
    pytest.importorskip("loralib")
    command = ["run", "--loader", "loralib", "--no-images", "--max-examples", "1", "--out"]
    first = CliRunner().invoke(main, [*command, str(tmp_path / "a")])
    before = read_run(tmp_path / "a" / "run.jsonl")
    cells = [record for record in before.records if isinstance(record, CellRecord)]
    assert cells
    assert all(each.fingerprint for each in cells)
    since = ["--since", str(tmp_path / "a" / "run.jsonl")]
    second = CliRunner().invoke(main, [*command, str(tmp_path / "b"), *since])
    after = read_run(tmp_path / "b" / "run.jsonl")
    assert second.exit_code == first.exit_code
    assert sum(after.carried.values()) == len(cells)
    assert after.counts == before.counts
    assert f"Carried over, not measured again: {len(cells)} cells from run {before.header.run_id}" in second.output
    assert not (tmp_path / "b" / "history.jsonl").exists()
