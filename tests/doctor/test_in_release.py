"""What `diagnose --tool-version` says is what the table of releases measured, and nothing that it did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from harness.checks.cell import Cell
from harness.checks.plan import planned
from harness.checks.trial_files import updates_of, write_example
from harness.doctor.answer import Answer, Question
from harness.doctor.answers import answer
from harness.doctor.diagnose import tool_named
from harness.doctor.in_release import in_release
from harness.doctor.traits import Traits
from harness.files import LoraWeights, read_lora, write_lora
from harness.law.known import Tool, tools
from harness.law.law import TRAINED, law_of_formula
from harness.law.released import NO_LAW, NO_MODEL, NOTHING, RAISES, SPELLED, released, versions_of
from harness.loaders.registry import resolve

LAYER = {
    "sd-unet": "down_blocks.{}.attentions.0.transformer_blocks.0.attn1.to_q",
    "qwen-image": "transformer_blocks.{}.attn.to_q",
    "flux": "single_transformer_blocks.{}.attn.to_q",
}
WIDTH = {"sd-unet": (320, 640, 1280), "qwen-image": (3072,) * 3, "flux": (3072,) * 3}
CELLS = [
    ("diffusers", "kohya", "sd-unet"),
    ("diffusers", "kohya", "qwen-image"),
    ("diffusers", "diffusers", "flux"),
    ("diffusers", "diffusers", "sd-unet"),
    ("diffsynth", "diffsynth", "qwen-image"),
    ("lycoris", "kohya", "qwen-image"),
    ("peft", "peft", "qwen-image"),
]
UNIFORM, MIXED = ((8, 4.0),) * 3, ((8, 4.0), (4, 4.0), (8, 16.0))


def file_of(folder: Path, form: str, bench: str, numbers: tuple[tuple[int, float | None], ...]) -> Traits:
    modules = {
        LAYER[bench].format(i): LoraWeights(torch.randn(r, width) / 9, torch.randn(width, r) / 9, alpha)
        for i, ((r, alpha), width) in enumerate(zip(numbers, WIDTH[bench], strict=True))
    }
    return Traits(read_lora(write_lora(folder / f"{form}.safetensors", form, modules)))


def asked_of(loader: str, version: str, traits: Traits) -> Answer:
    return answer(tool_named(loader, version), traits, Question(version))


@cache
def rows() -> list[tuple[str, str, str, str]]:
    return [(*cell, version) for cell in CELLS for version in versions_of(cell[0])]


@pytest.mark.parametrize(("loader", "form", "bench"), CELLS)
@pytest.mark.parametrize("numbers", [UNIFORM, MIXED], ids=["uniform", "mixed"])
def test_the_answer_is_what_the_release_was_measured_to_do(
    tmp_path: Path, loader: str, form: str, bench: str, numbers: tuple[tuple[int, float], ...]
) -> None:
    traits = file_of(tmp_path, form, bench, numbers)
    for version in versions_of(loader):
        seen, given = released(loader, version, form, bench), asked_of(loader, version, traits)
        assert seen, version
        others = {NO_MODEL: "cannot", NOTHING: "nothing", RAISES: "raises", NO_LAW: "wrong"}
        if seen.state in others:
            assert (given.effect, given.strength) == (others[seen.state], None), version
        elif seen.state == TRAINED.formula or (numbers is UNIFORM and seen.trait):
            assert (given.effect, given.strength) == ("law", 1.0), version
        elif numbers is UNIFORM:
            assert (seen.state, given.strength) == ("strength", 0.5), version
        else:
            assert (given.effect, given.strength) == ("factor", None), version


def test_the_release_that_a_row_is_about_is_answered_alike_by_the_table(tmp_path: Path) -> None:
    for loader, form, bench in CELLS:
        for numbers in (UNIFORM, MIXED):
            traits, tool = file_of(tmp_path, form, bench, numbers), tools()[loader]
            now = answer(tool, traits, Question())
            table = in_release(tool, traits, Question(tool.release))
            assert (table.effect, table.strength) == (now.effect, now.strength), (loader, form, bench, numbers)


@pytest.mark.parametrize(("loader", "form", "bench"), CELLS)
def test_the_checks_still_spell_keys_as_the_table_is_read(tmp_path: Path, loader: str, form: str, bench: str) -> None:
    cell = Cell(replace(resolve("peft")), form, bench, "lora")
    example = next(iter(planned(cell)))
    traits = Traits(read_lora(write_example(cell, example, updates_of(cell, example), tmp_path)))
    assert [group.spelled for group in traits.groups] == [(SPELLED[form],)]
    assert traits.groups[0].places[0] == (bench, "own")


def unmeasured(tmp_path: Path) -> Iterator[tuple[str, Traits, str, str]]:
    plain = file_of(tmp_path, "kohya", "sd-unet", UNIFORM)
    yield "0.33.0", plain, "diffusers", "0.32.2 and 0.33.1"
    yield "99.0", plain, "diffusers", "0.42.1"
    yield "banana", plain, "diffusers", "0.42.1"
    yield ">=1; rm", plain, "diffusers", "0.42.1"
    yield "0.33.1", file_of(tmp_path, "kohya", "sd-unet", ((8, None),) * 3), "diffusers", "alpha is missing"
    yield "0.33.1", file_of(tmp_path, "kohya", "sd-unet", ((8, -4.0),) * 3), "diffusers", "negative"
    yield "99.0", file_of(tmp_path, "peft", "qwen-image", UNIFORM), "peft", "0.21.2"
    yield "1.0", plain, "comfyui", "measured on"
    yield "1.0", plain, "a1111", "read in the code"


def test_what_no_release_was_measured_on_is_not_answered(tmp_path: Path) -> None:
    for version, traits, name, told in unmeasured(tmp_path):
        given = asked_of(name, version, traits)
        assert (given.effect, given.strength, given.sure) == ("unknown", None, "unknown"), (version, name)
        assert told in given.says, given.says
        assert ("`lora-harness install" in given.do) == (version[0].isdigit() and name not in ("comfyui", "a1111"))


def test_a_fault_found_in_another_release_is_not_called_absent(tmp_path: Path) -> None:
    traits = file_of(tmp_path, "kohya", "sd-unet", UNIFORM)
    fault = replace(next(iter(traits.findings), None) or _fault(), effect="raises", tools=("diffusers",), versions="")
    object.__setattr__(traits, "findings", (fault,))
    given = asked_of("diffusers", "0.38.0", traits)
    assert (given.effect, given.strength) == ("unknown", None)
    assert "was not measured" in given.says


def _fault():  # type: ignore[no-untyped-def]
    from harness.law.findings import findings

    return findings()["diffusers-negative-alpha-hang"]


def test_a_variant_that_only_the_newest_release_was_measured_on_is_not_judged_in_an_older_one(tmp_path: Path) -> None:
    traits = file_of(tmp_path, "peft", "qwen-image", UNIFORM)
    for name, module in traits.adapter.modules.items():
        traits.adapter.modules[name] = replace(module, variant="dora")  # type: ignore[index]
    given = asked_of("peft", "0.12.0", traits)
    assert (given.effect, given.strength) == ("unknown", None)
    assert "dora" in given.says


def test_every_law_of_the_table_is_read_back() -> None:
    states = {seen.state for row in rows() if (seen := released(row[0], row[3], row[1], row[2]))}
    for state in states - {NO_MODEL, NOTHING, RAISES, NO_LAW}:
        law = law_of_formula(state)
        assert law
        assert law.formula == state


def test_tools_with_releases_name_a_loader_of_the_table() -> None:
    named = {tool.loader.partition("-")[0] for tool in tools().values() if isinstance(tool, Tool)}
    assert {cell[0] for cell in CELLS} <= named
