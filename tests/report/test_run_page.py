"""The page of a whole run: what is new, what is known by finding, one matrix; small enough for a phone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe import serious_faults
from report_samples import HOSTILE, IGNORED, failed, full_run, known, passed, probes, run_of

from harness.report.html import write_report
from harness.report.known import known_groups
from harness.report.links import cited, code_link, finding_link
from harness.report.matrix import lines, said
from harness.report.summary import cells

Open = Callable[..., Any]
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
FINDING = "lycoris-missing-alpha"
FOLDER = "docs/findings"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full")
    return write_report([full_run(out)], out)


@pytest.fixture
def phone(chromium: Any, opened: Open) -> Any:
    """Return what opens a page on a phone that is touched."""
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    yield opened
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def text_of(browser: Any, selector: str) -> str:
    found: str = browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)
    return found


def in_view(browser: Any, selector: str) -> bool:
    script = "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
    return bool(browser.execute_script(script + "return b.height > 0 && b.top >= -1 && b.top < innerHeight", selector))


def test_the_page_of_a_full_run_is_small(page: Path, opened: Open) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.sub(r"data:image/[^\"]+", "", text)) <= 1_000_000
    assert opened(page).execute_script("return document.querySelectorAll('*').length") <= 10_000


def test_six_phone_screens_come_before_the_folds(page: Path, phone: Open) -> None:
    folds = "return document.querySelector('section:has(> .fold)').getBoundingClientRect().top + scrollY"
    assert phone(page).execute_script(folds) <= 6 * PHONE["height"]


def test_it_begins_with_the_verdict_then_the_news_then_what_is_known(page: Path) -> None:
    order = re.findall(r'<section id="(\w+)">', page.read_text(encoding="utf-8"))
    assert order[:5] == ["verdict", "failures", "known", "matrix", "sweeps"]


@pytest.mark.parametrize(("outcome", "at"), [("failed", "failures"), ("xfailed", "known"), ("passed", "checks")])
def test_a_number_of_the_verdict_leads_to_its_list(outcome: str, at: str, page: Path, opened: Open) -> None:
    browser = opened(page)
    browser.execute_script("document.querySelector(`.counts a[data-s=${arguments[0]}]`).click()", outcome)
    assert browser.execute_script("return location.hash") == f"#s={outcome}"
    assert in_view(browser, f"#{at}")
    rows = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.getClientRects().length)"
    shown = {"failures": ".cause", "known": ".known tbody tr", "checks": ".cell"}[at]
    assert set(browser.execute_script(rows + ".map((e) => e.dataset.o)", shown)) == {outcome} or at == "checks"
    assert browser.execute_script(rows + ".length", shown) > 0


def test_without_javascript_a_number_still_leads_to_its_list(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = dict(re.findall(r'<a href="#(\w+)" data-s="(\w+)"', text))
    assert links.items() >= {"failures": "failed", "known": "xfailed", "checks": "passed"}.items()
    assert all(f'<section id="{identifier}">' in text for identifier in links)


def test_a_cell_says_its_law_when_it_is_focused_and_when_it_is_pointed_at(page: Path, opened: Open) -> None:
    browser = opened(page)
    browser.execute_script("document.querySelector('.c.xfailed').focus()")
    browser.execute_async_script("setTimeout(arguments[0], 600)")  # a smooth scroll to it
    assert "known: loader raised TypeError (LH901)" in text_of(browser, "#tip:not([hidden])")
    browser.execute_script("document.activeElement.blur()")
    over = (
        "const e = document.querySelector('.c.failed'); e.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
    )
    browser.execute_script(over)
    assert "law strength" in text_of(browser, "#tip:not([hidden])")


def test_the_first_tap_tells_and_the_second_goes_there(page: Path, phone: Open) -> None:
    browser = phone(page)
    browser.execute_script("document.querySelector('.c.failed').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = "const b = document.querySelector('.c.failed').getBoundingClientRect(); return [b.x + 8, b.y + 8]"
    x, y = browser.execute_script(box)
    for hash_ in ("", "#v-"):
        points = [{"x": x, "y": y}]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points})
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        browser.execute_async_script("setTimeout(arguments[0], 500)")
        assert browser.execute_script("return location.hash").startswith(hash_)
        if not hash_:
            assert browser.execute_script("return location.hash") == ""
            assert "law strength" in text_of(browser, "#tip:not([hidden])")


def test_the_matrix_expands_into_words_without_javascript(page: Path, opened: Open, chromium: Any) -> None:
    tall = "return document.querySelector('.matrix').offsetHeight"
    browser = opened(page)
    before = browser.execute_script(tall)
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.find_element("id", "words").send_keys(" ")
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.execute_script(tall) > 2 * before


def test_a_known_cell_above_a_right_law_says_what_is_known(tmp_path: Path) -> None:
    records = [known("x", "kohya", "b"), passed("x", "scaling law", bench="b", law=None)]
    records.append(probes("x", "kohya", "b", IGNORED.model_copy(update={"name": "as trained"})))
    (cell,) = cells(run_of(*records)).values()
    assert said(cell) == "known: alpha ignored (LH202)"


def test_known_failures_are_one_row_per_finding() -> None:
    link = f"(docs/findings/{FINDING}.md)"
    some = [known("a", fmt, "b").model_copy(update={"reason": f"raises {link}"}) for fmt in ("kohya", "peft")]
    other = known("b", "kohya", "c").model_copy(update={"reason": f"raises too {link}", "code": "LH901"})
    web = known("c", "kohya", "c").model_copy(update={"reason": "odd (https://example.org/1 (fixed in 2))"})
    own = known("c", "peft", "c").model_copy(update={"reason": "only known to us"})
    first, *rest = known_groups([*some, other, web, own])
    assert (first.page, first.codes, first.loaders, len(first.cells)) == (FINDING, ["LH202", "LH901"], ["a", "b"], 3)
    assert [(group.what, group.address) for group in rest] == [
        ("odd", "https://example.org/1"),
        ("only known to us", None),
    ]


@pytest.mark.parametrize("reason", [*HOSTILE, "x (javascript:alert(1))", f"x ({FOLDER}/../../etc.md)", "((", ""])
def test_only_an_address_becomes_a_link(reason: str, tmp_path: Path) -> None:
    verdict = known("a", "kohya", "b").model_copy(update={"reason": reason})
    (group,) = known_groups([verdict])
    assert group.address is None
    assert group.page == ""
    assert "javascript:" not in re.sub(r">[^<]*<", "", write_report([run_of(verdict)], tmp_path).read_text())


def test_a_reason_is_split_from_its_link() -> None:
    assert cited(f"f(x) is wrong ({FOLDER}/a-b.md)") == ("f(x) is wrong", f"{FOLDER}/a-b.md", "")
    assert cited("old (http://a/b (fixed in 2.0.5))") == ("old", "http://a/b", "(fixed in 2.0.5)")
    assert cited("no link (at all)") == ("no link (at all)", "", "")


def test_codes_and_findings_are_links_where_a_site_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = known("a", "kohya", "b").model_copy(update={"reason": f"x (docs/findings/{FINDING}.md)"})
    assert (code_link("LH202"), finding_link(FINDING)) == (None, None)
    monkeypatch.setenv("LORA_HARNESS_SITE", "https://example.org/lora/")
    text = write_report([run_of(verdict, failed())], tmp_path).read_text(encoding="utf-8")
    assert text.count('href="https://example.org/lora/codes/LH202.html"') >= 3
    assert f'href="https://example.org/lora/findings/{FINDING}.html"' in text
    assert code_link("LH999") is None
    assert finding_link("../secret") is None


def test_every_measured_cell_stands_in_the_line_of_its_loader(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    grid = cells(run)
    told = [cell for line in lines(grid) for cell in line.cells]
    assert sorted(map(id, told)) == sorted(id(cell) for cell in grid.values() if cell.outcome != "skipped")
    assert sum(line.skipped for line in lines(grid)) == sum(cell.outcome == "skipped" for cell in grid.values())


def test_a_link_to_a_folded_section_opens_it(page: Path, opened: Open) -> None:
    browser = opened(page, "#laws")
    assert browser.execute_script("return document.querySelector('#laws > .fold').open")
    assert in_view(browser, "#laws")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_fault(theme: str, page: Path, opened: Open, chromium: Any) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser = opened(page)
    browser.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert serious_faults(browser) == []
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_cut_full_run_is_no_larger(tmp_path: Path) -> None:
    run = replace(full_run(tmp_path), footer=None, cut="the run has no footer")
    assert "cut short" in write_report([run], tmp_path).read_text(encoding="utf-8")
