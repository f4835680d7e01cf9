from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_samples import HOSTILE, failed, file_records, matrix_records, night, passed, run_of, sweep

from harness.report.history import history_record
from harness.report.html import write_report
from harness.report.models import LoraFacts, SweepRecord

Open = Callable[..., Any]
VISIBLE = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.getClientRects().length).length"
HASH = "return location.hash"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser")
    run = night(out)
    other = replace(run, header=run.header.model_copy(update={"run_id": "other"}))
    return write_report([run], out, history=[history_record(run), history_record(other)])


def first_paint(browser: Any) -> float:
    script = "new PerformanceObserver((l) => arguments[0](l.getEntriesByName('first-contentful-paint')[0].startTime))"
    found: float = browser.execute_async_script(script + ".observe({type: 'paint', buffered: true})")
    return found


def settle(browser: Any) -> None:
    browser.execute_async_script("setTimeout(arguments[0], 160)")


def enter(browser: Any, name: str, value: str) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    browser.execute_script(script + "e.dispatchEvent(new Event('input', {bubbles: true}))", name, value)


def search(browser: Any, text: str) -> None:
    enter(browser, "q", text)
    settle(browser)


def tick(browser: Any, outcome: str) -> None:
    browser.execute_script("document.querySelector(`input[name=s][value=${arguments[0]}]`).click()", outcome)
    settle(browser)


def test_it_opens_with_the_network_off_and_without_a_complaint(opened: Open, page: Path) -> None:
    browser = opened(page)
    assert browser.execute_script("return document.querySelector('h1').textContent") == (
        "3 of 5 loaders do not reproduce the training."
    )
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    broken = "return [...document.images].filter((i) => i.loading !== 'lazy' && !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0


def test_the_page_never_scrolls_sideways(opened: Open, page: Path) -> None:
    browser = opened(page)
    for width in (360, 390, 768, 1280):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        over = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert over <= 0, f"{over} px too wide at {width}"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_outcome_filter_shows_what_it_says_and_stays_in_the_url(opened: Open, page: Path) -> None:
    browser = opened(page)
    everything = browser.execute_script(VISIBLE, ".cell")
    tick(browser, "failed")
    assert browser.execute_script(HASH) == "#s=failed"
    assert browser.execute_script(VISIBLE, ".cell") == 12 < everything
    assert browser.execute_script("return document.getElementById('shown').textContent") == "24 of 498 checks"
    again = opened(page, "#s=failed")
    assert again.execute_script(VISIBLE, ".cell") == 12
    again.find_element("id", "clear").click()
    assert again.execute_script(VISIBLE, ".cell") == everything
    assert again.execute_script(HASH) == ""


def test_search_and_selects_combine(opened: Open, page: Path) -> None:
    browser = opened(page)
    search(browser, "raw_alpha scaling")
    assert browser.execute_script(VISIBLE, ".cell") == 8
    enter(browser, "f", "kohya")
    settle(browser)
    assert browser.execute_script(VISIBLE, ".cell") == 2
    assert browser.execute_script(HASH) == "#q=raw_alpha+scaling&f=kohya"
    search(browser, "no such thing")
    assert browser.execute_script(VISIBLE, ".cell") == 0


def test_a_deep_link_opens_and_lights_its_target(opened: Open, page: Path) -> None:
    browser = opened(page)
    target = browser.execute_script("return document.querySelector('.more .target').id")
    browser = opened(page, f"#{target}")
    assert browser.execute_script(VISIBLE, f"#{target}") == 1
    assert browser.execute_script("return document.querySelector('.lit').id") == target
    top = f"return document.getElementById('{target}').getBoundingClientRect().top"
    assert 0 <= browser.execute_script(top) < 900


def test_a_matrix_cell_leads_to_its_failure(opened: Open, page: Path) -> None:
    browser = opened(page)
    browser.execute_script("document.querySelector('.matrix .c.failed').click()")
    settle(browser)
    assert "LH202" in browser.execute_script("return document.querySelector('.lit').textContent")


def test_a_link_to_something_filtered_out_shows_it(opened: Open, page: Path) -> None:
    browser = opened(page, "#s=passed")
    assert browser.execute_script(VISIBLE, ".cause") == 0
    browser.execute_script("document.querySelector('.findings a').click()")
    settle(browser)
    assert browser.execute_script(VISIBLE, ".cause .lit") == 1


def test_keys_walk_the_failures_and_find_the_search(opened: Open, page: Path) -> None:
    browser = opened(page)
    body = browser.find_element("tag name", "body")
    lit = "return document.querySelector('.lit').textContent.slice(0, 5)"
    body.send_keys("j")
    assert browser.execute_script(lit) == "LH201"
    body.send_keys("j")
    assert browser.execute_script(lit) == "LH202"
    body.send_keys("k")
    assert browser.execute_script(lit) == "LH201"
    body.send_keys("/")
    assert browser.execute_script("return document.activeElement.id") == "q"


def test_the_theme_follows_the_system_and_the_button(opened: Open, page: Path) -> None:
    browser = opened(page)
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(paper) == "rgb(251, 250, 247)"
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert browser.execute_script(paper) == "rgb(20, 21, 23)"
    browser.find_element("id", "theme").click()
    assert browser.execute_script(paper) == "rgb(251, 250, 247)"
    browser.execute_script("try { localStorage.clear() } catch {}")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_slider_cuts_the_pair_and_a_picture_can_be_chosen(opened: Open, page: Path) -> None:
    browser = opened(page)
    clip = "return getComputedStyle(document.querySelector('.pair .right')).clipPath"
    assert "50%" in browser.execute_script(clip)
    move = "const r = document.querySelector('.compare input'); r.value = 20; r.dispatchEvent(new Event('input'))"
    browser.execute_script(move)
    assert "20%" in browser.execute_script(clip)
    before = browser.execute_script("return document.querySelector('.pair .right').src")
    browser.execute_script("document.querySelector('.tile[data-strength=\"32\"]').click()")
    assert browser.execute_script("return document.querySelector('.compare output').textContent") == "32"
    assert browser.execute_script("return document.querySelector('.pair .right').src") != before


def test_without_javascript_everything_is_there_to_read(chromium: Any, page: Path) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(page.resolve().as_uri())
        root = chromium.execute_cdp_cmd("DOM.getDocument", {"depth": 0})["root"]["nodeId"]

        def boxes(selector: str) -> list[bool]:
            found = chromium.execute_cdp_cmd("DOM.querySelectorAll", {"nodeId": root, "selector": selector})["nodeIds"]
            styles = (chromium.execute_cdp_cmd("CSS.getComputedStyleForNode", {"nodeId": node}) for node in found)
            return [{"name": "display", "value": "none"} not in style["computedStyle"] for style in styles]

        chromium.execute_cdp_cmd("CSS.enable", {})
        assert len(boxes(".checks li")) == 66
        assert all(boxes(".cause, .known tr, .c, .cell, .checks li, .sweep, .law, .pair img"))
        assert not any(boxes("#filter, #theme, #tip, .compare input"))
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_print_leaves_the_controls_out(opened: Open, page: Path) -> None:
    browser = opened(page)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(VISIBLE, "#filter, #theme, nav, .copy") == 0
    assert browser.execute_script(VISIBLE, ".cause") == 3
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_hostile_metadata_does_nothing(opened: Open, tmp_path: Path) -> None:
    records = [failed(text, text, format=text, title=text, rows=((text, text),), reproduce=text) for text in HOSTILE]
    strips = [SweepRecord(loader=text, lora=LoraFacts(name=text), strength=1, metrics={text: 1.0}) for text in HOSTILE]
    everywhere = "".join(HOSTILE)
    run = run_of(*records, *strips, command=everywhere, machine=everywhere, planned=HOSTILE, versions={everywhere: "1"})
    out = write_report([run], tmp_path)
    browser = opened(out)
    for text in ("script", "onerror"):
        search(browser, text)
    opened(out, "#q=<img src=x onerror=\"document.title='owned'\">&at=<script>")
    browser.execute_script("for (const a of document.querySelectorAll('a')) if (a.hash) a.click()")
    settle(browser)
    assert browser.title.startswith("failed – lora-harness")
    assert browser.execute_script("return document.scripts.length") == 1
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.get_log("browser") == []


def test_inline_script_that_slips_through_would_still_be_stopped(chromium: Any, page: Path, tmp_path: Path) -> None:
    hurt = tmp_path / "hurt.html"
    text = page.read_text(encoding="utf-8").replace("<h1>", "<script>document.title='owned'</script><h1>")
    hurt.write_text(text, encoding="utf-8")
    chromium.get(hurt.as_uri())
    assert chromium.title.startswith("failed")
    assert any("Content Security Policy" in entry["message"] for entry in chromium.get_log("browser"))


def test_five_thousand_rows_stay_quick(opened: Open, tmp_path: Path) -> None:
    verdicts = [passed(f"loader {n % 10}", f"check {n // 80}", format=f"f{n // 10 % 8}") for n in range(4800)]
    verdicts += [failed(f"loader {n % 10}", f"odd {n // 10}") for n in range(200)]
    strips = sweep(tmp_path, "peft", 4.0, prompts=3)
    path = write_report([replace(run_of(*verdicts, *strips, *file_records()), folder=tmp_path)], tmp_path)
    browser = opened(path)
    paint = first_paint(browser)
    start = "const t = performance.now(); const q = document.getElementById('q'); q.value = 'odd 19';"
    filtering = browser.execute_script(
        start + "document.getElementById('filter').dispatchEvent(new Event('submit'));"
        "return new Promise((done) => { q.dispatchEvent(new Event('input', {bubbles: true}));"
        "setTimeout(() => requestAnimationFrame(() => done(performance.now() - t)), 81) })"
    )
    assert browser.execute_script("return document.getElementById('shown').textContent") == "10 of 5000 checks"
    assert paint < 5000, f"first paint after {paint:.0f} ms"
    assert filtering < 2500, f"a search took {filtering:.0f} ms"


def test_many_checks_that_passed_are_one_line_that_names_them(opened: Open, tmp_path: Path) -> None:
    browser = opened(write_report([run_of(*(passed(check=f"check {n}") for n in range(250)))], tmp_path))
    names = browser.execute_script("return document.querySelector('.checks .names').textContent").split(", ")
    assert sorted(names) == sorted(f"check {n}" for n in range(250))
    search(browser, "check 24")
    assert browser.execute_script("return document.getElementById('shown').textContent") == "13 of 250 checks"


def test_a_page_without_failures_or_checks_has_working_script(opened: Open, tmp_path: Path) -> None:
    opened(write_report([run_of()], tmp_path / "empty"))
    opened(write_report([run_of(passed())], tmp_path / "green"))
    opened(write_report([run_of(*matrix_records()[:20])], tmp_path / "some"))  # type: ignore[arg-type]
