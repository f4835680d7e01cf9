"""The site: every link leads somewhere, data stands beside every page, and what to pass is two clicks away."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin
from xml.etree import ElementTree

import pytest
from axe import serious_faults
from click.testing import CliRunner
from report_samples import HOSTILE, IGNORED, failed, full_run, known, passed, run_of, write_run
from test_html import Page

from harness.commands.site import command
from harness.errors import UserError
from harness.law.explained import about_code, about_finding, examples_of
from harness.law.findings import findings
from harness.law.known import prescribe, tools
from harness.law.released import versions_of
from harness.report.models import ProbeRecord
from harness.report.records import read_run
from harness.report.site.badge import badge_state, badge_text
from harness.report.site.loaders import ALPHAS, RANKS, Loader, UniformFile, site_loaders
from harness.report.site.markdown import finding_html
from harness.report.site.pages import site_pages, write_site
from harness.verdict.codes import CODES

Open = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "pages"
    write_site([full_run(tmp_path_factory.mktemp("run"))], out)
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    found = {str(path.relative_to(site)): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert all(page.open == [] for page in found.values())
    return found


def test_every_link_leads_to_a_page_and_a_place_on_it(pages: dict[str, Page], site: Path) -> None:
    assert len(pages) > 140
    for address, page in pages.items():
        for link in page.all("a"):
            target = str(link["href"])
            if re.match("https?://", target):
                continue
            path, _, place = urljoin(f"/{address}", target).removeprefix("/").partition("#")
            assert (site / unquote(path)).is_file(), f"{address} links to {target}"
            if place and path.endswith(".html"):
                assert place in pages[unquote(path)].texts, f"{address} links to {target}"


def test_a_page_asks_for_nothing_from_outside(pages: dict[str, Page]) -> None:
    for page in pages.values():
        for tag, attrs in page.elements:
            assert not any(name.startswith("on") or name == "style" for name in attrs)
            if tag in ("img", "script", "link"):
                assert not re.match(r"(https?:)?//", attrs.get("src") or attrs.get("href") or "")


def test_there_is_a_page_and_its_data_for_every_loader_finding_format_and_code(site: Path) -> None:
    names = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert names == {path.relative_to(site).with_suffix("") for path in site.rglob("*.json")}
    assert {path.stem for path in (site / "codes").glob("*.html")} == set(CODES)
    assert {path.stem for path in (site / "findings").glob("*.html")} == set(findings())
    assert {path.stem for path in (site / "loaders").glob("*.html")} >= {*tools()} - {"raw alpha"}
    for path in site.rglob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["kind"]


@pytest.mark.parametrize("code", CODES)
def test_the_page_of_a_code_says_what_explain_says(code: str, pages: dict[str, Page], site: Path) -> None:
    text = "".join(piece for pieces in pages[f"codes/{code}.html"].pieces.values() for piece in pieces)
    told = about_code(CODES[code])
    for part in (told["title"], told["cause"], told["fix"], *examples_of(code).values()):
        assert part in text
    data = json.loads((site / "codes" / f"{code}.json").read_text(encoding="utf-8"))
    assert data.items() >= json.loads(json.dumps(told)).items()


@pytest.mark.parametrize("name", findings())
def test_the_page_of_a_finding_says_what_explain_says(name: str, pages: dict[str, Page]) -> None:
    page = pages[f"findings/{name}.html"]
    told = about_finding(findings()[name])
    for part in (told["title"], told["says"], told["upstream"]):
        assert part in page.texts["content"]


def test_raw_html_in_a_finding_stays_text_and_its_links_lead_to_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# T\n\n<script>x</script> [a](lycoris-missing-alpha.md) [b](../x.md) [c](javascript:alert(1)) [d](https://e.f)\n"
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    shown = str(finding_html("any"))
    assert "<script>" not in shown
    assert re.findall('href="(.*?)"', shown) == ["lycoris-missing-alpha.html", "https://e.f"]
    assert "javascript:" not in re.sub(r">[^<]*<", "", shown)


def test_the_site_of_the_committed_run_answers_in_two_clicks(tmp_path: Path) -> None:
    write_site([read_run(ROOT / "reports" / "run.jsonl.gz")], tmp_path / "site")
    front = Page((tmp_path / "site" / "index.html").read_text(encoding="utf-8"))
    assert "loaders/diffsynth-2.0.4.html" in {link["href"] for link in front.all("a")}
    told = json.loads((tmp_path / "site" / "loaders" / "diffsynth-2.0.4.json").read_text(encoding="utf-8"))
    assert {"rank": 32, "alpha": 16.0, "pass": 0.5} in told["answers"]
    assert [run["version"] for run in told["runs"]] == ["2.0.4"]
    assert told["formats"] == ["diffsynth", "comfyui"]


def test_numbers_are_those_of_the_prescription() -> None:
    found = {loader.name: loader for loader in site_loaders([run_of(passed("other"))])}
    for name, tool in tools().items():
        assert [rank for rank, _ in found[name].answers] == list(RANKS)
        for rank, numbers in found[name].answers:
            wanted = [prescribe(tool.law, [UniformFile(alpha, rank)]) for alpha in ALPHAS]
            assert numbers == wanted


def test_a_loader_that_only_a_run_knows_has_numbers_of_its_measured_law(tmp_path: Path) -> None:
    record = ProbeRecord(loader="mine.py:load", format="kohya", bench="b", law=IGNORED)
    (loader, *_) = site_loaders([run_of(failed("mine.py:load", bench="b"), record)])
    assert (loader.formula, loader.right, loader.number(32, 16.0)) == ("strength", False, 0.5)
    odd = IGNORED.model_copy(update={"formula": "something else", "constant": None})
    (other, *_) = site_loaders([run_of(failed("y", bench="b", law=odd))])
    assert (other.formula, other.right, other.answers) == ("", None, [])


def test_the_newest_run_of_a_release_counts_and_releases_stand_side_by_side(tmp_path: Path) -> None:
    def run(day: int, version: str, outcome: str) -> Any:
        verdict = passed("x", loader_version=version, outcome=outcome)
        return write_run(tmp_path / f"{day}", [verdict], created=f"2026-11-{day}T00:00:00+00:00", run_id=f"r{day}")

    runs = [run(12, "1.0", "failed"), run(10, "1.0", "passed"), run(11, "2.0", "passed")]
    (loader, *_) = site_loaders(runs)
    assert [(seen.version, seen.outcome, seen.run_id) for seen in loader.seen] == [
        ("1.0", "failed", "r12"),
        ("2.0", "passed", "r11"),
    ]


@pytest.mark.parametrize("name", ["diffusers", "peft", "lycoris", "diffsynth", "diffsynth-2.0.4"])
def test_a_loader_s_page_has_what_each_of_its_releases_was_measured_to_do(name: str, site: Path) -> None:
    text = (site / "loaders" / f"{name}.html").read_text(encoding="utf-8")
    versions = versions_of(name.partition("-")[0])
    assert versions
    assert all(f'<th scope="row">{version}</th>' in text for version in versions)
    assert "Each release" not in (site / "loaders" / "comfyui.html").read_text(encoding="utf-8")


def test_a_badge_is_svg_that_says_the_law(site: Path) -> None:
    every = {path.stem: ElementTree.parse(path).getroot() for path in (site / "badges").glob("*.svg")}
    assert len(every) == len(list((site / "loaders").glob("*.html")))
    assert every["diffsynth-2.0.4"].get("aria-label") == "DiffSynth-Studio <= 2.0.4 (2.0.4): LoRA scale strength ✕"
    assert "alpha / rank ✓" in str(every["peft"].get("aria-label"))


def test_what_was_not_measured_gets_no_green_badge() -> None:
    by_name = {loader.name: loader for loader in site_loaders([run_of(passed("odd"))])}
    assert badge_text(by_name["vllm"]) == "alpha / rank, not measured"
    assert badge_state(by_name["odd"]) == "unknown"
    broken = Loader("peft", site_loaders([run_of(failed("peft"))])[0].seen, tools()["peft"])
    assert badge_state(broken) == "wrong"


def test_hostile_names_make_no_markup_and_no_path(tmp_path: Path) -> None:
    verdicts = [passed("../../etc/passwd"), passed("..")]
    for text in HOSTILE:
        verdicts += [failed(text, loader_version=text, format=text, bench=text, code=text, title=text)]
        verdicts += [known(f"../{text}", "kohya", "b")]
    write_site([run_of(*verdicts)], tmp_path / "site")
    assert {path.name for path in tmp_path.iterdir()} == {"site"}
    for path in (tmp_path / "site").rglob("*.html"):
        written = path.read_text(encoding="utf-8")
        assert not any(character in written for character in "\x1b\u202e")
        assert len(Page(written).all("img")) == 0
        assert len(Page(written).all("script")) <= 2
    for path in (tmp_path / "site" / "badges").glob("*.svg"):
        ElementTree.parse(path)


def test_a_folder_that_is_no_site_is_left_alone_and_a_site_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="no site that this command wrote"):
        write_site([run_of(passed())], tmp_path / "mine")
    assert write_site([run_of(passed())], tmp_path / "new") == write_site([run_of(passed())], tmp_path / "new")
    with pytest.raises(UserError, match="no run"):
        write_site([], tmp_path / "none")


def test_a_cut_run_is_said_to_be_cut() -> None:
    run = replace(run_of(passed()), footer=None, cut="no footer")
    front = [*site_pages([run])][-1]
    assert front.values["runs"][-1].cut


def test_the_command_says_where_the_site_is(tmp_path: Path) -> None:
    write_run(tmp_path, [passed()])
    done = CliRunner().invoke(command, [str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "site")])
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r"\d+ pages: .*index.html\n", done.output)


def test_from_the_front_page_the_number_is_at_most_two_clicks_away(site: Path, opened: Open) -> None:
    browser = opened(site / "index.html")
    row = "return [...document.querySelectorAll('#loaders tbody tr')].find((e) => e.textContent.includes('<= 2.0.4'))"
    assert "0.5 as alpha" in browser.execute_script(f"{row}.innerText").replace("\t", " ")
    browser.execute_script(f"{row}.querySelector('a').click()".replace("return ", ""))
    assert browser.execute_script("return document.querySelector('.answers .asked').textContent") == "0.5"
    assert browser.execute_script("return document.querySelector('#pass h2').textContent") == "What to pass as alpha"


@pytest.mark.parametrize(
    ("asked", "finds"), [("noise", "LH601"), ("diffsynth 2.0.4", "DiffSynth-Studio <= 2.0.4"), ("lora_unet_", "kohya")]
)
def test_the_search_finds_without_a_server(asked: str, finds: str, site: Path, opened: Open) -> None:
    browser = opened(site / "index.html")
    enter = "const q = document.getElementById('q'); q.value = arguments[0]; q.dispatchEvent(new Event('input'))"
    browser.execute_script(enter, asked)
    assert finds in browser.execute_script("return document.getElementById('found').innerText")
    again = opened(site / "index.html", f"?q={asked}")
    assert finds in again.execute_script("return document.getElementById('found').innerText")
    browser.execute_script(enter, "no such thing at all")
    assert browser.execute_script("return document.getElementById('found').innerText") == "nothing found"


@pytest.mark.parametrize("page", ["index.html", "loaders/diffsynth-2.0.4.html", "codes/LH202.html"])
def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_a_phone(
    page: str, site: Path, opened: Open, chromium: Any
) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser = opened(site / page)
    over = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    found = serious_faults(browser)
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert (over <= 0, found) == (True, [])
