from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
from report_samples import BENCHES, failed, header, night, passed, run_of, sweep, write_run

from harness.errors import UserError
from harness.report.models import Footer, PartRecord, SweepRecord
from harness.report.records import RunWriter, merge_runs, read_run
from harness.report.view import energy_by_block
from harness.verdict.file_record import FileRecord


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    records = [passed(), failed(), *sweep(tmp_path, "peft", 1.0, prompts=1)]
    run = write_run(tmp_path, records)
    assert run.records == tuple(records)
    assert run.header == header()
    assert run.footer == Footer(counts={"passed": 1, "failed": 1}, seconds=run.footer.seconds, exit_code=1)


def test_a_file_record_of_an_older_version_is_read_with_what_it_has(tmp_path: Path) -> None:
    older = {"kind": "file", "path": "x", "format": "kohya", "hazards": [{"code": "LH701"}], "energy": {"a.0.q": 1.0}}
    path = tmp_path / "run.jsonl"
    path.write_text(f"{header().model_dump_json()}\n{json.dumps(older)}\n", encoding="utf-8")
    (record,) = read_run(path).of(FileRecord)
    assert (record.path, record.modules, record.codes, record.severity) == ("x", 0, ("LH701",), "warning")
    assert energy_by_block(record) == [("a.0", 1.0)]


def test_infinite_ratios_survive_json(tmp_path: Path) -> None:
    run = write_run(tmp_path, [passed(ratio=float("inf"))])
    assert run.verdicts[0].ratio == float("inf")


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.jsonl", header()) as writer:
        writer.write(passed())
        half = read_run(tmp_path / "run.jsonl")
    assert len(half.verdicts) == 1
    assert half.status == "cut"


def test_an_exception_leaves_a_red_run_with_what_ran(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run.jsonl", header())
    writer.__enter__()
    writer.write(passed())
    writer.__exit__(RuntimeError, RuntimeError("power cut"), None)
    run = read_run(tmp_path / "run.jsonl")
    assert run.footer is None
    assert run.status == "cut"
    assert len(run.verdicts) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"run\.jsonl: cannot be written \(No space"),
        RunWriter(tmp_path / "run.jsonl", header()),
    ):
        pass


def test_a_zipped_run_is_read_and_a_broken_or_endless_one_refused(tmp_path: Path, monkeypatch) -> None:
    run = write_run(tmp_path, [passed(), failed()])
    raw, path = gzip.compress((tmp_path / "run.jsonl").read_bytes()), tmp_path / "run.jsonl.gz"
    path.write_bytes(raw)
    assert read_run(path).records == run.records
    for damaged, why in ((raw[:-9], "is no whole gzip file"), (b"{}", "cannot be read: Not a gzipped file")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=why):
            read_run(path)
    path.write_bytes(raw)
    monkeypatch.setattr("harness.outputs._MOST_UNZIPPED", 100)
    with pytest.raises(UserError, match="becomes more than 100 bytes"):
        read_run(path)


def test_a_truncated_last_line_is_a_cut_run(tmp_path: Path) -> None:
    write_run(tmp_path, [passed(), passed(check="coverage")])
    path = tmp_path / "run.jsonl"
    path.write_bytes(path.read_bytes()[:-120])
    run = read_run(path)
    assert run.status == "cut"
    assert "truncated" in str(run.cut)
    assert len(run.verdicts) == 1


def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(header().model_dump_json() + '\n{"kind":"verdict","loader":3}\n{}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.jsonl:2: not a record: loader"):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no header"),
        ('{"kind":"footer","counts":{},"seconds":1,"exit_code":0}\n', "no header"),
        ("not json\nat all\n", "run.jsonl:1"),
        ('{"kind":"surprise"}\n{}\n', "surprise"),
        ("\xff".encode("latin-1"), "not UTF-8"),
    ],
)
def test_what_is_no_run_file_is_refused_in_one_sentence(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        read_run(path)


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_run(tmp_path / "absent.jsonl")


def test_a_newer_schema_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(header(schema_version=99).model_dump_json() + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="update lora-harness"):
        read_run(path)


def test_records_are_echoed_line_by_line(tmp_path: Path) -> None:
    echo = io.StringIO()
    with RunWriter(None, header(), echo=echo) as writer:
        writer.write(passed())
    kinds = [json.loads(line)["kind"] for line in echo.getvalue().splitlines()]
    assert kinds == ["header", "verdict", "footer"]


def test_the_exit_code_can_be_overridden(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.jsonl", header()) as writer:
        writer.write(passed())
        writer.exit_code = 2
    assert read_run(tmp_path / "run.jsonl").status == "failed"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("passed", "passed"), ("xfailed", "passed"), ("failed", "failed"), ("errored", "failed"), ("xpassed", "failed")],
)
def test_every_outcome_colours_the_run(outcome: str, status: str) -> None:
    assert run_of(passed(outcome=outcome)).status == status


def test_a_run_of_skipped_checks_is_not_green() -> None:
    assert run_of(passed(outcome="skipped")).status == "incomplete"
    assert run_of().status == "incomplete"


@pytest.mark.parametrize(
    ("planned", "measured"),
    [
        ("checks:peft", True),
        ("checks:diffusers", False),
        ("sweep:peft", True),
        ("sweep:peft@cpu", True),
        ("sweep:peft@cuda", False),
        ("sweep@cuda", False),
        ("law:peft", False),
        ("something else", False),
    ],
)
def test_a_planned_part_counts_only_when_it_left_a_record(tmp_path: Path, planned: str, measured: bool) -> None:
    records = [passed(), *sweep(tmp_path, "peft", 1.0, prompts=1)]
    run = run_of(*records, planned=(planned,))
    assert run.status == ("passed" if measured else "incomplete")
    assert [part.name for part in run.missing] == ([] if measured else [planned])


def test_a_skipped_gpu_check_does_not_count_as_measured() -> None:
    run = run_of(passed(), passed("diffusers", outcome="skipped", reason="no GPU"), planned=("checks:diffusers",))
    assert run.status == "incomplete"


def test_the_reason_of_an_unmeasured_part_is_kept() -> None:
    part = PartRecord(name="sweep:peft@cuda", measured=False, reason="no CUDA device")
    run = run_of(passed(), part, planned=(part.name,))
    assert run.missing == (part,)


def test_merging_adds_up_and_resolves_pictures(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", sweep(tmp_path / "one", "peft", 1.0, prompts=1), run_id="one", machine="a")
    two = write_run(tmp_path / "two", [passed("diffusers")], run_id="two", machine="b")
    run = merge_runs([one, two])
    assert (run.header.run_id, run.header.machine) == ("one, two", "a, b")
    assert run.footer is not None
    assert run.footer.counts == {"passed": 1}
    assert all((run.folder / image.path).is_file() for record in run.of(SweepRecord) for image in record.images)


def test_merging_one_red_or_cut_run_makes_all_red(tmp_path: Path) -> None:
    good, bad, cut = run_of(passed()), run_of(failed()), write_run(tmp_path, [passed()])
    cut = type(cut)(cut.header, cut.records, None, cut.folder, "no footer")
    assert merge_runs([good, bad]).status == "failed"
    assert merge_runs([good, cut]).status == "cut"
    with pytest.raises(UserError, match="no run"):
        merge_runs([])


def test_a_part_missing_on_one_machine_is_found_on_another(tmp_path: Path) -> None:
    part = PartRecord(name="sweep:peft@cpu", measured=False, reason="no time")
    here = run_of(passed(), part, planned=(part.name,))
    there = run_of(*sweep(tmp_path, "peft", 1.0, prompts=1), planned=(part.name,))
    assert merge_runs([here]).status == "incomplete"
    assert merge_runs([here, there]).status == "passed"


def test_the_sample_night_covers_every_kind_of_record(tmp_path: Path) -> None:
    kinds = {type(record).__name__ for record in night(tmp_path).records}
    assert kinds == {"Verdict", "ProbeRecord", "SweepRecord", "FileRecord", "PowerRecord"}
    assert len(BENCHES) == 2
