"""Pictures and strips on the page of a run: which, how large, what they link to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from page_reading import page_of
from report_samples import (
    failed,
    passed,
    run_of,
    sweep,
    write_run,
)

from harness.report.html import write_report
from harness.report.models import LoraFacts, SweepImage, SweepRecord
from harness.report.records import merge_runs, read_run
from harness.report.strips import Size, _size

PROMPTS = tuple(SweepImage(path="x.png", prompt=str(n), seed=0) for n in range(8))


def test_an_unrun_sweep_is_never_green(tmp_path: Path) -> None:
    page = page_of(run_of(passed(), planned=("sweep:peft@cuda",)), tmp_path)
    assert "incomplete" in page.texts["verdict"]
    assert "sweep:peft@cuda: planned, but never ran" in page.texts["unmeasured"]


def test_pictures_are_inlined_and_linked_and_missing_ones_left_out(tmp_path: Path) -> None:
    records = sweep(tmp_path, "raw", 16.0, prompts=1)
    (tmp_path / records[2].images[0].path).unlink()
    (tmp_path / records[3].images[0].path).write_bytes(b"no picture")
    page = page_of(replace(run_of(*records), folder=tmp_path), tmp_path)
    tiles = [a for a in page.all("a") if a.get("class") == "tile"]
    assert len(tiles) == len(records) - 2
    assert all((img["src"] or "").startswith("data:image/webp;base64,") for img in page.all("img"))
    assert all(img.get("alt") for img in page.all("img"))


def test_the_difference_map_states_its_gain(tmp_path: Path) -> None:
    records = [*sweep(tmp_path, "raw", 16.0, prompts=1), *sweep(tmp_path, "peft", 1.0, prompts=1)]
    text = page_of(replace(run_of(*records), folder=tmp_path), tmp_path).texts["sweeps"]
    assert re.search(r"difference to the reference, × \d+", text)
    assert "no difference to the reference" in text


def test_pictures_that_lie_elsewhere_are_copied_beside_the_report(tmp_path: Path) -> None:
    run = merge_runs([replace(run_of(*sweep(tmp_path / "a", "peft", 1.0, prompts=1)), folder=tmp_path / "a"), run_of()])
    page = page_of(run, tmp_path / "out")
    tiles = [str(a["href"]) for a in page.all("a") if a.get("class") == "tile"]
    assert len(tiles) == 9
    assert all((tmp_path / "out" / unquote(tile)).is_file() for tile in tiles)


def test_records_beside_a_report_find_their_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", sweep(tmp_path / "a", "peft", 1.0, prompts=1))
    write_report([run], tmp_path / "out")
    again = page_of(read_run(tmp_path / "out" / "results.jsonl"), tmp_path / "again")
    assert len([a for a in again.all("a") if a.get("class") == "tile"]) == 9


def test_a_picture_cell_shows_the_factor(tmp_path: Path) -> None:
    verdict = failed(check="images", bench="base", law=None, estimated_factor=8.0)
    text = page_of(run_of(verdict), tmp_path).texts["matrix"]
    assert "pictures" in text
    assert "8× as trained" in text


@pytest.mark.parametrize(("loaders", "side"), [(8, 160), (2, 160), (12, 64)])
def test_many_pictures_stay_small_on_the_page(loaders: int, side: int, tmp_path: Path) -> None:
    records = [
        record for n in range(loaders) for record in sweep(tmp_path, f"loader-{n}", 8.0, prompts=3, side=side)[::2]
    ]
    path = write_report([replace(run_of(*records), folder=tmp_path)], tmp_path)
    assert 200_000 < path.stat().st_size < 5_000_000


def test_thumbnails_shrink_before_prompts_are_left_out() -> None:
    groups = [[SweepRecord(loader="x", lora=LoraFacts(name="x"), strength=n, images=PROMPTS) for n in range(9)]] * 8
    assert _size(groups, 512) == Size(4, 64)
    assert _size(groups * 9, 512) == Size(1, 64)
    assert _size(groups[:1], 512) == Size(3, 192)
    assert _size(groups[:1], 64) == Size(6, 192)


def test_five_thousand_verdicts_and_sixty_pictures_stay_small(tmp_path: Path) -> None:
    verdicts = [passed(f"loader {n % 10}", f"check {n // 80}", format=f"f{n // 10 % 8}") for n in range(4800)]
    verdicts += [failed(f"loader {n % 10}", f"odd {n // 10}") for n in range(200)]
    records = sweep(tmp_path, "peft", 4.0, prompts=3)
    path = write_report([replace(run_of(*verdicts, *records), folder=tmp_path)], tmp_path)
    assert path.stat().st_size < 5_000_000


def test_prompts_that_are_left_out_are_told(tmp_path: Path) -> None:
    (record,) = sweep(tmp_path, "peft", 1.0, prompts=1)[:1]
    many = tuple(image.model_copy(update={"seed": seed}) for image in record.images for seed in range(8))
    run = replace(run_of(record.model_copy(update={"images": many})), folder=tmp_path)
    assert "2 more prompts and seeds were drawn" in page_of(run, tmp_path).texts["sweeps"]


def test_the_strips_of_wrong_loaders_come_first(tmp_path: Path) -> None:
    records = [*sweep(tmp_path, "peft", 1.0, prompts=1), *sweep(tmp_path, "raw", 16.0, prompts=1)]
    text = page_of(replace(run_of(*records, failed("peft"), failed("raw", "images")), folder=tmp_path), tmp_path).texts[
        "sweeps"
    ]
    assert text.index("raw sample-r8-a16") < text.index("peft sample-r8-a16")
