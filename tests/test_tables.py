"""The tables of docs are those that the data give, and a sample of the data is measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("benchmarks")

from benchmarks.lora_file import UNIFORM, make_file, outcome
from benchmarks.prescriptions import PAGE, folder_pairs, pairs
from benchmarks.reads import SCHEMES, _folded, bench_shapes, diffusers_reader, layer_patterns, live_reader, row
from benchmarks.tables import DOCS, PAGES
from benchmarks.zoo import zoo
from harness.law.reads import TABLE
from harness.loaders.registry import installed

AVAILABLE = {each.name for each in installed() if each.available}
ROWS: dict[tuple[str, ...], dict[str, Any]] = {
    (r["tool"], r["family"], r["names"], r["scheme"]): r for r in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
}
SAMPLE = ("bare.A.none", "bare.default.tensor", "transformer.A.tensor", "transformer.A.header", "lora_unet.down.tensor")


@pytest.mark.parametrize("family", ["hunyuan-video", "sana"])
@pytest.mark.parametrize("whole", [False, True])
def test_factors_that_a_loader_never_sets_are_told(family: str, whole: bool) -> None:
    """diffusers leaves the factors of keys with another adapter's name without memory, and only logs it."""
    animal = zoo()[family]
    names = dict(list(animal.names("own").items())[:4])
    file = make_file(
        names, animal.layers, f"transformer.default.none{'+vector' if whole else ''}", UNIFORM, "transformer"
    )
    assert outcome(diffusers_reader(animal, whole=whole), file) == "weights never set"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_data_give(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name]()


def test_the_plot_of_audits_is_of_the_data() -> None:
    from benchmarks.audit_growth import PLOT, described, points

    assert described(points()) in PLOT.read_text(encoding="utf-8")


def test_the_layers_that_tell_an_architecture_are_those_of_its_class() -> None:
    assert json.loads(TABLE.read_text(encoding="utf-8"))["layers"] == layer_patterns()


@pytest.mark.parametrize("scheme", SAMPLE)
@pytest.mark.parametrize("family", ["qwen-image", "sd-unet"])
def test_diffusers_still_reads_what_the_table_says(family: str, scheme: str) -> None:
    animal = zoo()[family]
    found = row(diffusers_reader(animal), animal.names("own"), animal.layers, scheme, animal.component)
    table = ROWS["diffusers", family, "own", scheme]
    assert found == {kind: _folded(table[kind]) for kind in ("uniform", "mixed") if kind in table}


@pytest.mark.parametrize("tool", ["lycoris", "diffsynth", "diffsynth-2.0.4"])
def test_other_tools_still_read_what_the_table_says(tool: str) -> None:
    if tool not in AVAILABLE:
        pytest.skip(f"{tool} is not installed here")
    shapes, scheme = bench_shapes("qwen-image"), "lora_unet.down.tensor" if tool == "lycoris" else "bare.default.tensor"
    found = row(live_reader(tool, "qwen-image"), {name: [name] for name in shapes}, shapes, scheme, "transformer")
    table = ROWS[tool, "qwen-image", "own", scheme]
    assert found == {kind: table[kind] for kind in ("uniform", "mixed") if kind in table}


def test_every_spelling_of_the_table_is_one_that_the_script_writes() -> None:
    from benchmarks.reads import DORA, PROCESSORS, RSLORA, TEXT, VARIANTS

    assert {scheme for *_, scheme in ROWS} <= {*SCHEMES, *PROCESSORS, *VARIANTS, *TEXT, *DORA, *RSLORA}


@pytest.mark.parametrize("scheme", ["lora_unet.down.tensor+out", "transformer.A.none+vector"])
def test_lycoris_still_reads_magnitudes_as_the_table_says(scheme: str) -> None:
    if "lycoris" not in AVAILABLE:
        pytest.skip("lycoris is not installed here")
    shapes = bench_shapes("qwen-image")
    reader = live_reader("lycoris", "qwen-image", whole=True)
    found = row(reader, {name: [name] for name in shapes}, shapes, scheme, "transformer")
    table = ROWS["lycoris", "qwen-image", "own", scheme]
    assert found == {kind: table[kind] for kind in ("uniform", "mixed") if kind in table}


def test_diffusers_still_reads_magnitudes_as_the_table_says() -> None:
    animal, scheme = zoo()["qwen-image"], "transformer.A.none+vector"
    found = row(diffusers_reader(animal, whole=True), animal.names("own"), animal.layers, scheme, animal.component)
    assert found == {"uniform": "ok"}
    assert ROWS["diffusers", "qwen-image", "own", scheme]["uniform"] == "ok"


def test_the_numbers_given_are_right_in_the_tools_own_code() -> None:
    found = list(pairs(("diffusers", "lycoris", "diffsynth", "diffsynth-2.0.4"), ("qwen-image",)))
    assert len([pair for pair in found if pair.agrees]) >= 25
    assert [pair for pair in found if pair.agrees is False] == []


def test_the_answers_for_pefts_folders_are_what_peft_and_transformers_do() -> None:
    found = list(folder_pairs())
    assert len(found) >= 16
    assert [pair for pair in found if not pair.agrees] == []


def test_the_committed_page_has_sixty_pairs_and_no_wrong_one() -> None:
    text = Path(PAGE).read_text(encoding="utf-8")
    assert text.count("| right |") >= 60
    assert "**wrong**" not in text
