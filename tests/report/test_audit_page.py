"""The page of an audit: grouped, small to the first view, its rows drawn as one scrolls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from axe import serious_faults
from library_samples import FINDING, library_of
from report_samples import HOSTILE

from harness.report.audit_page import audit_page
from harness.report.library import Library, most_of
from harness.verdict.file_record import FileRecord, Hazard

Open = Callable[..., Any]
SHOWN = "return document.getElementById('shown').textContent"
ROWS = "return document.querySelectorAll('.files tbody tr:not(.group)').length"
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


def written(rows: Sequence[FileRecord], path: Path) -> Path:
    path.write_text("".join(audit_page(rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def five_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(library_of(5000), tmp_path_factory.mktemp("audit") / "audit.html")


def settle(browser: Any) -> None:
    browser.execute_async_script("setTimeout(arguments[0], 200)")


def test_five_thousand_files_are_at_most_500_kilobytes(five_thousand: Path, opened: Open) -> None:
    assert five_thousand.stat().st_size <= 500_000
    browser = opened(five_thousand)
    assert browser.execute_script(SHOWN) == "5,000 of 5,000 files"
    assert browser.execute_script("return document.querySelectorAll('*').length") < 2_000


def test_rows_are_drawn_as_one_scrolls(five_thousand: Path, opened: Open) -> None:
    browser = opened(five_thousand)
    first = browser.execute_script(ROWS)
    assert 30 < first < 200
    for _ in range(3):
        browser.execute_script("scrollTo({top: document.documentElement.scrollHeight, behavior: 'instant'})")
        settle(browser)
    assert first + 100 < browser.execute_script(ROWS) < 1000


def test_a_page_of_20_000_files_works(opened: Open, tmp_path: Path) -> None:
    rows = library_of(20_000)
    browser = opened(written(rows, tmp_path / "audit.html"))
    assert browser.execute_script(SHOWN) == "20,000 of 20,000 files"
    browser.execute_script(
        "const q = document.getElementById('q'); q.value = 'lh799'; q.dispatchEvent(new Event('input'))"
    )
    settle(browser)
    broken = sum("LH799" in row.codes for row in rows)
    assert browser.execute_script(SHOWN) == f"{broken:,} of 20,000 files"


def test_broken_files_come_first_and_a_sentence_is_said_once_per_group(five_thousand: Path, opened: Open) -> None:
    browser = opened(five_thousand)
    groups = browser.execute_script("return [...document.querySelectorAll('tr.group')].map((e) => e.textContent)")
    assert groups[0].startswith("LH799 unreadable")
    browser = opened(five_thousand, "#code=LH701")
    said = "return document.querySelector('#files tbody').textContent.split('ask the trainer').length - 1"
    assert browser.execute_script(said) == 1
    assert browser.execute_script(ROWS) > 30


@pytest.mark.parametrize("by", ["folder", "base", "trainer", ""])
def test_files_are_grouped_as_chosen_and_it_stays_in_the_url(by: str, five_thousand: Path, opened: Open) -> None:
    browser = opened(five_thousand)
    choose = "const b = document.getElementById('by'); b.value = arguments[0]; b.dispatchEvent(new Event('change'))"
    browser.execute_script(choose, by)
    assert browser.execute_script("return location.hash") == f"#by={by}"
    again = opened(five_thousand, f"#by={by}")
    assert again.execute_script("return document.getElementById('by').value") == by
    assert bool(again.execute_script("return document.querySelectorAll('tr.group').length")) == bool(by)


@pytest.mark.parametrize(
    ("link", "field"),
    [("[data-facet=code][data-value=LH703]", "codes"), ("[data-facet=finding]", "findings")],
)
def test_a_number_shows_those_files_and_the_filter_is_in_the_url(
    link: str, field: str, five_thousand: Path, opened: Open
) -> None:
    value = {"codes": "LH703", "findings": FINDING}[field]
    wanted = sum(value in getattr(row, field) for row in library_of(5000))
    browser = opened(five_thousand)
    assert f"{wanted:,}" in browser.execute_script("return document.querySelector(arguments[0]).textContent", link)
    browser.execute_script("document.querySelector(arguments[0]).click()", link)
    assert browser.execute_script(SHOWN) == f"{wanted:,} of 5,000 files"
    hash_ = browser.execute_script("return location.hash")
    assert value in hash_
    assert opened(five_thousand, hash_).execute_script(SHOWN) == f"{wanted:,} of 5,000 files"
    browser.execute_script("document.querySelector('#facets button').click()")
    assert browser.execute_script(SHOWN) == "5,000 of 5,000 files"


def test_without_javascript_the_gravest_files_are_there(five_thousand: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", five_thousand.read_text(encoding="utf-8"), flags=re.DOTALL)
    gravest = [row.path for row in library_of(5000) if "LH799" in row.codes][:50]
    assert all(path in text for path in gravest)
    assert "The 60 gravest of 5,000 files" in text


def test_the_script_shows_every_row_as_it_is(opened: Open, tmp_path: Path) -> None:
    rows = library_of(90)
    browser = opened(written(rows, tmp_path / "audit.html"), "#by=")
    browser.execute_script("document.querySelector('#more button').click()")
    lines = browser.execute_script("return [...document.querySelectorAll('.files tbody tr')].map((e) => e.innerText)")
    assert len(lines) == 90
    for row in rows:
        (line,) = [line for line in lines if row.path in line]
        told = [*(hazard.what for hazard in row.hazards), row.format or "not read", row.trainer or ""]
        assert all(text in line for text in told)


@pytest.mark.parametrize("text", [*HOSTILE, "</script><script>document.title='owned'</script>", "<!--<script>"])
def test_hostile_text_stays_text_in_the_data_too(text: str, opened: Open, tmp_path: Path) -> None:
    hazard = Hazard(code=text, what=text)
    facts = {"ranks": {text: 1}, "alphas": {text: 1}, "metadata": {"ss_sd_model_name": text}, "findings": (text,)}
    row = FileRecord(path=f"{text}/{text}", format=text, trainer=text, hazards=(hazard,), duplicate_of=text, **facts)
    path = written([row, FileRecord(path=text)], tmp_path / "audit.html")
    assert not any(character in path.read_text(encoding="utf-8") for character in "\x1b\u202e")
    browser = opened(path)
    assert browser.title == "2 LoRA files – lora-harness audit"
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return document.querySelectorAll('img, svg').length") == 0
    assert browser.execute_script(SHOWN) == "2 of 2 files"


def test_the_rows_of_the_page_are_json_in_which_a_string_stands_once(five_thousand: Path) -> None:
    text = five_thousand.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="rows">(.*?)</script>', text, re.DOTALL)
    assert len(json.loads(data)) == 5000
    assert data.count("ask the trainer") == 1


def test_counting_a_library() -> None:
    fine = FileRecord(path="a/x.safetensors", format="kohya")
    cut = FileRecord(path="b/y.safetensors", hazards=(Hazard(code="LH799", what="cut"),))
    odd = FileRecord(path="b/z.safetensors", format="kohya", hazards=(Hazard(code="LH701", what="none"),) * 2)
    model = FileRecord(path="b/base.safetensors", hazards=(Hazard(code="LH797", what="a full checkpoint"),))
    library = Library([fine, cut, odd, model], most=2)
    assert library.headline == "3 LoRA files: 1 without hazards, 1 with, 1 unreadable; 1 file without a known LoRA"
    assert library.folders["b"].broken == 1
    assert [code for code, _ in library.by_gravity()] == ["LH799", "LH701", "LH797"]
    assert (library.codes["LH701"].files, library.codes["LH701"].sentence) == (1, "none")
    assert [row.path for row in library.worst] == ["b/y.safetensors", "b/z.safetensors"]
    assert [(name, tally.files, tally.broken) for name, tally in most_of(library.folders, 9)] == [
        ("b", 3, 1),
        ("a", 1, 0),
    ]


@pytest.mark.parametrize("phone", [False, True])
def test_axe_finds_no_serious_fault(phone: bool, five_thousand: Path, opened: Open, chromium: Any) -> None:
    if phone:
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    browser = opened(five_thousand)
    over = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert serious_faults(browser) == []
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert over <= 0
