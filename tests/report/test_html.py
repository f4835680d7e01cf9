"""The page of a run: every part, safe text, plots, gates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from page_reading import Page, page_of
from report_samples import (
    FORMATS,
    HOSTILE,
    IGNORED,
    TRAINED,
    failed,
    file_records,
    matrix_records,
    night,
    passed,
    probes,
    run_of,
    sweep,
    write_run,
)

from harness.errors import UserError
from harness.report.gates import GateResult
from harness.report.history import history_record
from harness.report.html import write_report
from harness.report.models import LoraFacts, PowerRecord, ProbePoint, SweepRecord
from harness.report.records import Run
from harness.report.view import energy_by_block
from harness.verdict.file_record import FileRecord, Hazard, ModuleEnergy


@pytest.fixture(scope="module")
def sample_night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, Page]:
    out = tmp_path_factory.mktemp("night")
    run = night(out)
    return run, out, page_of(run, out, history=[history_record(run), history_record(replace_id(run))])


def replace_id(run: Run) -> Run:
    return replace(run, header=run.header.model_copy(update={"run_id": "other"}))


def test_every_part_is_there_and_every_link_leads_somewhere(sample_night: tuple[Run, Path, Page]) -> None:
    _, out, page = sample_night
    parts = {"verdict", "unmeasured", "matrix", "failures", "sweeps", "laws", "files", "power", "history", "checks"}
    assert parts <= set(page.texts)
    for link in page.all("a"):
        target = link["href"] or ""
        if target.startswith("#") and "=" not in target:
            assert target[1:] in page.texts
        elif not target.startswith("#"):
            assert (out / unquote(target)).is_file()


def test_the_page_asks_for_nothing_from_outside(sample_night: tuple[Run, Path, Page]) -> None:
    page = sample_night[2]
    for _, attrs in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        for name in ("src", "href"):
            value = attrs.get(name) or ""
            assert not re.match(r"(https?:)?//|javascript:", value)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)
    assert "unsafe" not in str(policy)


def test_failures_carry_exactly_the_text_of_the_terminal(sample_night: tuple[Run, Path, Page]) -> None:
    run, _, page = sample_night
    told = [text.rstrip("\n") for identifier, text in page.texts.items() if identifier.startswith("v-")]
    for verdict in run.verdicts:
        assert verdict.ok or verdict.text() in told


def test_the_matrix_cell_of_a_failure_links_to_its_text(tmp_path: Path) -> None:
    write = failed(format="kohya")
    text = write_report([run_of(write, passed("peft"))], tmp_path).read_text(encoding="utf-8")
    cell = re.search(r'<a class="c failed" href="#(v-[0-9a-f]+)"[^>]*>(.*?)</a>', text)
    assert cell is not None
    assert cell[2] == "<b>✕W</b><i>kohya lora: wrong: alpha ignored (LH202), law strength</i>"
    assert Page(text).texts[cell[1]].strip() == write.text()


def test_the_report_is_a_pure_function_of_the_records(tmp_path: Path) -> None:
    run = run_of(*matrix_records(), *sweep(tmp_path, "peft", 1.0))  # type: ignore[arg-type]
    run = replace(run, folder=tmp_path)
    one = write_report([run], tmp_path).read_bytes()
    assert write_report([run], tmp_path).read_bytes() == one


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_everywhere(text: str, tmp_path: Path) -> None:
    everywhere = failed(
        text, text, format=text, bench=text, variant=text, code=text, title=text, loader_version=text, reproduce=text,
        worst_module=text, reason=text, rows=((text, text),), law=IGNORED.model_copy(update={"formula": text}),
    )  # fmt: skip
    record = probes(text, text, text, TRAINED, count=3)
    strip = SweepRecord(loader=text, lora=LoraFacts(name=text), strength=1, label=text, metrics={text: 1.0})
    audit = FileRecord(path=text, format=text, energy={text: 1.0}, prescription={text: None})
    run = run_of(everywhere, record, strip, audit, command=text, versions={text: text}, machine=text, planned=(text,))
    page = page_of(run, tmp_path, history=[history_record(run), history_record(replace_id(run))])
    clean = page_of(run_of(everywhere.model_copy(update={"loader": "x"})), tmp_path / "clean")
    assert len(page.all("img")) == 0
    assert all(svg.get("class") in ("plot", "trend") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert {"h1", "pre"} <= {tag for tag, _ in clean.elements} & {tag for tag, _ in page.elements}
    assert len(page.all("script")) == 1
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)
        assert not (attrs.get("href") or "").lower().startswith("javascript")
    written = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "\x1b" not in written
    assert "\u202e" not in written
    assert "owned'</" not in written
    assert "12963" not in "".join(page.texts.values())


def test_a_cut_run_says_so_first(tmp_path: Path) -> None:
    run = replace(run_of(passed()), footer=None, cut="the last line (3) is truncated")
    page = page_of(run, tmp_path)
    assert "cut short" in page.texts["verdict"]
    assert "the last line (3) is truncated" in page.texts["unmeasured"]


def test_a_green_run_and_an_empty_run_have_reports(tmp_path: Path) -> None:
    assert "passed" in page_of(run_of(passed()), tmp_path).texts["verdict"]
    empty = page_of(run_of(), tmp_path)
    assert "Nothing was measured." in empty.texts["verdict"]
    assert "failures" not in empty.texts


def test_the_command_seed_and_versions_are_shown(sample_night: tuple[Run, Path, Page]) -> None:
    run, _, page = sample_night
    assert page.texts["command"] == run.header.command
    for name, version in run.header.versions.items():
        assert f"{name}{version}" in page.texts["verdict"].replace("\n", "")


def test_a_cell_leads_to_the_plot_of_its_law(sample_night: tuple[Run, Path, Page]) -> None:
    page = sample_night[2]
    links = {str(a["href"])[1:] for a in page.all("a") if str(a["href"]).startswith("#law-")}
    assert len(links) == 2
    assert links <= set(page.texts)
    for link in links:
        assert "lora on qwen-image" in page.texts[link]
        assert "48 probes" in page.texts[link]


def test_a_law_as_trained_is_not_drawn_and_one_law_is_drawn_once(tmp_path: Path) -> None:
    odd = [probes("x", fmt, "b", IGNORED, count=4) for fmt in FORMATS]
    twice = probes("x", "kohya", "b", IGNORED, count=4).model_copy(update={"variant": "dora"})
    page = page_of(run_of(probes("x", "peft", "c", TRAINED), *odd, twice), tmp_path)
    assert len(page.all("figure")) == 2
    assert "x kohya dora on b" in " ".join(page.texts["laws"].split())
    drawn, also = re.findall(r"x (\w+) lora on b.*; the same (.*?)\n", page.texts["laws"], re.DOTALL)[0]
    assert {drawn, *also.split(", ")} == {drawn, *(f"{fmt} on b" for fmt in FORMATS if fmt != drawn)}


def test_figures_have_alt_text_and_the_probes_stay_in_the_records(sample_night: tuple[Run, Path, Page]) -> None:
    page = sample_night[2]
    plots = [svg for svg in page.all("svg") if svg.get("class") == "plot"]
    assert len(plots) == 2 + 6
    assert all(plot.get("role") == "img" and plot.get("aria-label") for plot in plots)
    assert "transformer_blocks.1.attn.to_q" not in page.texts["laws"]
    assert "All probes are in run.jsonl" in page.texts["laws"]


def test_no_label_of_a_plot_is_smaller_than_11_pixels_on_a_phone(sample_night: tuple[Run, Path, Page]) -> None:
    text = (sample_night[1] / "index.html").read_text(encoding="utf-8")
    plots = re.findall(r'<svg viewBox="[^>]*class="plot">.*?</svg>', text, re.DOTALL)
    for plot in plots:
        width = float(re.findall(r'viewBox="0 0 ([\d.]+)', plot)[0])
        shown = 326 if width < 300 else 9 * 105.6  # the column of a phone of 360 px; nine columns of a strip
        assert min(map(float, re.findall(r'font-size="([\d.]+)', plot))) * shown / width >= 11
    assert len(plots) == 8


def test_without_plotting_libraries_the_tables_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.svg.find_spec", lambda name: None)
    monkeypatch.setattr("harness.report.strips.find_spec", lambda name: None)
    run = night(tmp_path)
    page = page_of(run, tmp_path)
    assert not [svg for svg in page.all("svg") if svg.get("class") == "plot"]
    assert "48 probes" in page.texts["laws"]
    assert "ssim reference" in page.texts["sweeps"]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1e-30])
def test_odd_scales_do_not_break_the_plots(value: float, tmp_path: Path) -> None:
    point = ProbePoint(module="m", strength=value, alpha=None, rank=4, measured=value, expected=value)
    record = probes("x", "kohya", "b", IGNORED, count=2).model_copy(update={"points": (point,)})
    page_of(run_of(record, record.model_copy(update={"law": None, "bench": "c"})), tmp_path)


def test_energy_is_summed_by_block() -> None:
    energy = {"blocks.0.attn.to_q": 3.0, "blocks.0.attn.to_k": 4.0, "blocks.1.x": 1.0}
    assert energy_by_block(FileRecord(path="", energy=energy)) == [("blocks.0", 5.0), ("blocks.1", 1.0)]
    assert energy_by_block(FileRecord(path="")) == energy_by_block(FileRecord(path="", energy={})) == []


def test_relative_energy_of_a_block_is_its_update_over_its_weights() -> None:
    def found(**energies: object) -> dict[str, float]:
        named = {name.replace("_", "."): energy for name, energy in energies.items()}
        return dict(energy_by_block(FileRecord.model_validate({"path": "", "energies": named})))

    query, key, other = {"norm": 3.0, "relative": 0.3}, {"norm": 4.0, "relative": 0.1}, {"norm": 9.0, "relative": None}
    assert found(a_0_q=query, a_0_k=key) == {"a.0": pytest.approx(5 / 1700**0.5)}
    assert found(a_0_q=query, a_0_k=other, a_1_q=other) == {"a.0": pytest.approx(0.3)}
    assert found(a_0_q=other) == {"a.0": 9.0}


def test_what_the_doctor_writes_is_read_back_and_shown(tmp_path: Path) -> None:
    energy = ModuleEnergy(norm=1.0, spectral=0.5, singular=(0.5,), effective_rank=1.0)
    hazard = Hazard(code="LH701", what="no alpha anywhere")
    facts = {"ranks": {"8": 3}, "alphas": {"none": 3}, "coverage": 0.5, "hazards": (hazard,), "modules": 3}
    record = FileRecord(path="x.safetensors", format="kohya", energies={"a.0.q": energy}, **facts)
    page = page_of(write_run(tmp_path, [record]), tmp_path)
    for text in ("x.safetensors", "LH701 no alpha anywhere", "50%", "a.0"):
        assert text in page.texts["files"]


def test_the_page_of_a_selftest_says_what_was_tried_and_what_named_means(tmp_path: Path) -> None:
    def record(name: str, named: int, examples: float | None) -> PowerRecord:
        facts = {"fault": "x", "expected_code": "LH201", "trials": 1, "detected": 1, "examples": examples}
        return PowerRecord(subject=name, named=named, **facts)

    some = [record("scale_laws:raw", 1, 1), record("scale_laws:half", 1, 3), record("dora:axis", 0, None)]
    right = PowerRecord(subject="peft", trials=500, detected=0, factor=1.0)
    page = page_of(run_of(*some, right, command="lora-harness selftest --quick"), tmp_path)
    text = " ".join(page.texts["power"].split())
    assert "3 wrong in one known way, 1 right" in text
    assert "lora-harness selftest --quick" in text
    assert "Named: all that was blamed has a code that is right for this fault" in text
    assert "dora11✕ 0–" in text
    assert "scale_laws22✓ 22" in text
    assert any(fold.get("class") == "fold" and "open" in fold for fold in page.all("details"))


def test_a_closed_and_an_open_gate_are_told(tmp_path: Path) -> None:
    result = GateResult("lost coverage", "peft kohya", "not measured now")
    closed = page_of(run_of(passed()), tmp_path, gate=[result]).texts["gate"]
    assert "lost coverage peft kohya: not measured now" in closed
    assert "nothing got worse" in page_of(run_of(passed()), tmp_path, gate=[]).texts["gate"]
    assert "gate" not in page_of(run_of(passed()), tmp_path).texts


def test_hazards_and_prescriptions_are_listed(tmp_path: Path) -> None:
    text = page_of(run_of(*file_records()), tmp_path).texts["files"]
    assert "LH703 mixed ratios" in text
    assert "no single value" in text


def test_links_into_last_nights_report_work_in_tonights(tmp_path: Path) -> None:
    verdicts = [failed(format=fmt) for fmt in FORMATS]
    one = page_of(run_of(*verdicts), tmp_path / "one")
    two = page_of(run_of(*verdicts[::-1], passed("peft")), tmp_path / "two")
    ids = {identifier for identifier in one.texts if identifier.startswith(("v-", "cell-"))}
    assert ids
    assert ids <= set(two.texts)


def test_the_records_lie_beside_the_report(tmp_path: Path) -> None:
    write_report([run_of(passed()), run_of(failed())], tmp_path)
    assert len((tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run_of(passed())], tmp_path / "file")


def test_five_thousand_different_failures_stay_small_and_none_is_lost(tmp_path: Path) -> None:
    verdicts = [failed(f"loader {n % 10}", code=f"LH{n}") for n in range(5000)]
    page = page_of(run_of(*verdicts), tmp_path)
    assert (tmp_path / "index.html").stat().st_size < 5_000_000
    assert sum(name.startswith("v-") for name in page.texts) == 5000
