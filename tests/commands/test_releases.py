"""`releases` and `install` as a user meets them; fake releases, and no network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from harness.checks.releases import CellLaw, ReleaseLaw
from harness.cli import main
from harness.loaders import package_index
from harness.report.history import flips, read_history
from harness.report.kept_releases import KeptReleases
from harness.report.releases import ReleaseTable, history_records, lines, render

RIGHT = "strength * alpha / rank"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No release, no index."""
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path / "releases"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    package_index.every_published.cache_clear()


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("releases", "peft", "--install"), "does not answer"),
        (("releases", "nosuch"), "is no loader whose releases are known"),
        (("releases", "peft", "--from", "99"), "no release of peft from 99 is here; --install asks the package index"),
        (("releases", "peft", "--from", "x"), "'x' is no version"),
        (("releases",), "name a LOADER, or give --newest"),
        (("releases", "peft", "--files", "."), "give --from and --to"),
        (("install", "peft==0.1.0"), "does not answer"),
        (("install", "peft>0.1"), "does not answer"),
        (("install", "pe ft"), "names no release"),
        (("check", "peft==0.1.0", "--install"), "does not answer"),
        (("check", "peft==0.1.0"), "run `lora-harness install peft==0.1.0`, or give --install"),
        (("sweep", "peft==0.1.0"), "run `lora-harness install peft==0.1.0`, or give --install"),
    ],
)
def test_without_release_or_network_it_is_one_sentence(words, says, tmp_path):
    folder = ("--out", str(tmp_path / "out")) if words[0] == "releases" else ()  # another test may write the usual one
    done = run(*words, *folder)
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "releases").exists()


def cell(state: str, bench: str = "flux", **more: object) -> CellLaw:
    return CellLaw("diffusers", bench, state, right=state == RIGHT, **more)  # type: ignore[arg-type]


def table(*states: tuple[str, str], problem: str = "") -> ReleaseTable:
    found = [ReleaseLaw(f"acme=={v}", v, (cell(state),), day="2026-01-02", seconds=3.0) for v, state in states]
    found += [ReleaseLaw("acme==9", "9", problem=problem)] if problem else []
    return ReleaseTable("acme", "acme-lora", tuple(found))


def test_a_table_says_which_release_changed_what():
    shown = list(lines(table(("1.0", RIGHT), ("1.1", RIGHT), ("2.0", "strength"), problem="cannot be installed: no")))
    assert shown[0] == "acme: diffusers/flux"
    assert shown[1].split()[:3] == ["1.0", "–", "1.1"]
    assert "acme-lora 9: cannot be installed: no" in shown
    assert shown[-1] == "acme 2.0 changed diffusers/flux: strength · alpha / rank → strength."


def test_the_page_escapes_what_a_release_says():
    hostile = "<script>alert(1)</script>\x1b[31m"
    found = ReleaseTable("acme", "acme", (ReleaseLaw("a", "1", (cell("raises", what=hostile),), problem=hostile),))
    page = render([found])
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert all("\x1b" not in line for line in lines(found))


def test_the_history_has_one_record_a_release_and_its_flips_follow_the_versions(tmp_path):
    from harness.report.history import append_records

    history = tmp_path / "history.jsonl"
    append_records(history, history_records(table(("2.0", "strength"), ("10.0", RIGHT))))
    append_records(history, history_records(table(("1.0", RIGHT), ("2.0", "strength"))))  # an older one, measured later
    records = read_history(history)
    assert [record.release for record in records] == ["2.0", "10.0", "1.0"]
    assert [flip.text() for flip in flips(records)] == [
        f"acme 2.0 -> 10.0: law `strength` -> `{RIGHT}`, wrong -> right (diffusers/flux)",
        f"acme 1.0 -> 2.0: law `{RIGHT}` -> `strength`, right -> wrong (diffusers/flux)",
    ]


def test_releases_are_not_compared_with_nights(tmp_path):
    from harness.report.history import HistoryCell, HistoryRecord, Trend

    night = HistoryRecord(
        run_id="n",
        created="2026-01-01T00:00:00+00:00",
        status="passed",
        cells=(HistoryCell(loader="acme", version="2.0", format="diffusers", bench="flux", outcome="passed"),),
    )
    history = [night, *history_records(table(("1.0", "strength")))]
    assert flips(history) == []
    assert Trend([*history, night.model_copy(update={"run_id": "m"})]).bars[0].record.run_id in ("n", "m")
    assert all(bar.record.release is None for bar in Trend([*history, night]).bars)


def test_json_has_every_release(tmp_path):
    told = json.loads(json.dumps(table(("1.0", RIGHT), ("2.0", "strength")).as_dict()))
    assert [each["version"] for each in told["releases"]] == ["1.0", "2.0"]
    assert told["changes"][0]["first"] == "2.0"


def test_a_release_that_cannot_be_had_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.loaders.between.releases_of", lambda live: ["0.0.1"])
    done = run("releases", "peft", "--bench", "qwen-image", "--out", str(tmp_path / "out"))
    assert done.exit_code == 2  # nothing was measured
    assert "peft 0.0.1: peft==0.0.1 is not here; run `lora-harness install peft==0.0.1`" in done.output
    assert "No release of peft could be measured." in done.output
    assert Path(tmp_path / "out" / "index.html").exists()


def fake_release(root: Path, version: str, begin: str) -> None:
    """Write a release of loralib that runs `begin` when it is imported and puts twice the trained scale."""
    from tests.checks.test_releases import WRONG, release

    release(root / "releases", version, WRONG, before=f"import os, time\n{begin}\n")


def test_a_run_that_is_killed_keeps_what_it_measured_and_leaves_no_process(tmp_path):
    began, pids, hold = (tmp_path / name for name in ("began", "pids", "hold"))
    hold.touch()
    note = f"open({str(began)!r}, 'a').write('%s ')\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')"
    fake_release(tmp_path, "9.0", note % "9.0")
    fake_release(tmp_path, "9.1", f"{note % '9.1'}\nwhile os.path.exists({str(hold)!r}): time.sleep(0.1)")
    out = tmp_path / "out"
    words = ["releases", "loralib", "--from", "9", "--every", "--bench", "qwen-image", "--out", str(out)]
    part = out / "releases.json.part.jsonl"
    with subprocess.Popen([sys.executable, "-m", "harness", *words], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: began.exists() and "9.1" in began.read_text())
        process.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids.read_text().split()))
    assert len(part.read_text().splitlines()) == 1
    hold.unlink()

    done = run(*words, "--resume")
    assert "loralib==9.0: 2 * strength * alpha / rank (measured before)" in done.output
    assert began.read_text().split() == ["9.0", "9.1", "9.1"]
    assert [each["version"] for each in json.loads((out / "releases.json").read_text())[0]["releases"]] == [
        "9.0",
        "9.1",
    ]
    assert not part.exists()

    run(*words, "--resume")  # takes over the tables that are whole
    assert began.read_text().split() == ["9.0", "9.1", "9.1"]


def wait_until(holds: Callable[[], bool], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def law(version: str, state: str = RIGHT, **more: Any) -> ReleaseLaw:
    return ReleaseLaw(f"acme=={version}", version, (cell(state),), **more)


@contextmanager
def kept_in(folder: Path, resume: bool = True) -> Iterator[KeptReleases]:
    found = KeptReleases(folder, resume=resume)
    yield found
    found.close(written=False)


def test_what_was_kept_is_taken_over_only_where_it_is_the_same_question(tmp_path, monkeypatch, capsys):
    from harness.checks.releases import SLOW

    places = [("diffusers", "flux")]
    with kept_in(tmp_path, resume=False) as kept:
        for each in (law("1"), law("2", SLOW), law("3", problem="process died"), law("4")):
            kept.add("acme", each)
    with (tmp_path / "releases.json.part.jsonl").open("a") as stream:
        stream.write('{"loader": "acme", "versions": {}, "releases": [{"cells": 3}]}\n[1]\n{"loader": "ac')

    with kept_in(tmp_path) as again:
        assert set(again.measured("acme", ["1", "2", "3"], places)) == {"1"}
        assert again.measured("acme", ["1"], [*places, ("kohya", "flux")]) == {}
        assert again.measured("other", ["1"], places) == {}
    assert "3 lines (5, 6, 7) are damaged" in capsys.readouterr().err
    with kept_in(tmp_path, resume=False) as fresh:
        assert fresh.measured("acme", ["1"], places) == {}
    assert "has 4 releases of a run that was cut; --resume takes them over" in capsys.readouterr().err
    monkeypatch.setattr("harness.report.kept_releases.installed_versions", lambda: {"torch": "1.0"})
    with kept_in(tmp_path) as beside_others:
        assert beside_others.measured("acme", ["1"], places) == {}


def test_tables_that_are_none_are_said_and_not_taken_over(tmp_path, capsys):
    (tmp_path / "releases.json").write_text('{"a": 1}')
    with kept_in(tmp_path) as kept:
        assert kept.measured("acme", ["1"], []) == {}
    assert "holds no tables of releases" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["releases.json"]
