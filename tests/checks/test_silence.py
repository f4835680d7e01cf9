"""What cannot be applied is applied right, refused or said to be left out; silence about it is LH103."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import check_loader
from harness.checks.cell import Cell, cells_of
from harness.checks.families.silence import _says, check_silence, tries_silence, undeclared
from harness.checks.observation import Observation
from harness.checks.plan import smoke_example
from harness.checks.trial import run_trial
from harness.isolation.calls import is_listened_to, listened
from harness.loaders.declaration import loader
from harness.loaders.live import quiet
from harness.loaders.registry import resolve
from harness.selftest.cases import broken_cases
from tests.checks.sample_loaders import right, transposed

SILENT = {case.name.partition(":")[2]: case for case in broken_cases() if case.name.startswith("silence:")}


def heard(cell: Cell) -> tuple[dict[str, str], list[Any]]:
    once: Observation = run_trial(cell, smoke_example(cell, cell.targets[:4]))
    return cell.heard, list(check_silence(cell, once, ()))


def test_a_loader_that_refuses_all_it_does_not_know_is_silent_about_nothing() -> None:
    outcomes, found = heard(Cell(resolve(right), "peft", "qwen-image"))
    assert found == []
    assert set(outcomes) > {"half of a pair", "dora", "rslora", "an unknown prefix"}
    assert outcomes["rslora"] == "applied"
    assert {outcomes[kind] for kind in ("a module the model lacks", "an unknown kind of key", "dora")} == {"refused"}


def test_of_a_loader_that_loads_nothing_nobody_says_what_it_is_silent_about() -> None:
    """Its warning is there for the whole file too, and a part of it is warned of in the same words."""

    def warns(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        warnings.warn("no key of the file was found in the model", stacklevel=2)

    assert heard(Cell(resolve(warns), "peft", "qwen-image")) == ({}, [])


@pytest.mark.parametrize("name", ["passes_over", "passes_over_other_shapes", "flag_not_read", "magnitude_dropped"])
def test_silence_is_found_and_named(name: str) -> None:
    (cell,) = SILENT[name].cells()
    _, found = heard(cell)
    fault = SILENT[name].fault
    assert fault is not None
    assert {finding.code for finding in found} == set(fault.codes)
    assert {finding.family for finding in found} == {"silence"}


def test_silence_is_tried_once_for_each_format() -> None:
    subject = resolve(right)
    cells = [Cell(subject, form, bench) for form in ("peft", "kohya") for bench in ("qwen-image", "qwen-image-fused")]
    assert [cell.format for cell in cells if tries_silence(cell)] == ["peft", "kohya"]
    assert not tries_silence(Cell(subject, "peft", "qwen-image", "rslora"))
    names = [place.variant_name for place in undeclared(cells[0])]
    assert names == ["rslora", "dora", "loha", "lokr", "lora-bias"]


def test_silence_is_tried_on_the_bench_and_in_the_format_that_were_asked_for() -> None:
    cells, _ = cells_of(resolve(right), ["peft", "kohya"], ["qwen-image-fused"])
    assert [cell.format for cell in cells if tries_silence(cell)] == ["peft", "kohya"]
    command = resolve("cmd:python merge.py --base {base} --lora {lora} --strength {strength} --out {out}")
    cells, _ = cells_of(command, ["kohya"], ["qwen-image-fused"], ["lora"])
    assert [tries_silence(cell) for cell in cells] == [True]


@loader(formats={"kohya"}, benches={"qwen-image", "sd-unet"})
def averages(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Give layers whose file it does not know something else than B @ A."""
    tensors = load_file(lora)
    for name, layer in model.named_modules():
        stem = f"lora_unet_{name.replace('.', '_')}"
        if f"{stem}.lora_mid.weight" in tensors:
            layer.weight.data += layer.weight.data.mean()


def test_a_variant_is_tried_on_another_bench_though_files_were_loaded_before() -> None:
    cell = Cell(resolve(averages), "kohya", "qwen-image")
    run_trial(cell, replace(smoke_example(cell, cell.targets), value_seed=1))
    outcomes, _ = heard(cell)
    assert outcomes["tucker"] == "silent"


def test_warnings_log_records_and_prints_are_heard_and_quiet_is_not_quiet_then() -> None:
    lines: list[str] = []
    logger = logging.getLogger("apart")
    logger.propagate = False
    with listened(lines), quiet(""):
        assert is_listened_to()
        print("printed")
        print("to stderr", file=sys.stderr)
        logger.warning("logged %d", 3)
        logger.debug("below the level")
    assert lines[:3] == ["warning: logged 3", "printed", "to stderr"]
    assert not any("below" in line for line in lines)
    assert not is_listened_to()


def warns(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    warnings.warn("2 keys were not used", stacklevel=1)


def test_what_a_loader_warns_of_comes_back_from_where_it_runs() -> None:
    cell = Cell(resolve(warns), "kohya", "qwen-image")
    seen = run_trial(cell, smoke_example(cell, cell.targets[:1]), listen=True)
    assert seen.said == ("warning: 2 keys were not used",)
    assert run_trial(cell, smoke_example(cell, cell.targets[:1])).said == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("warning: anything new", True),
        ("skipped transformer_blocks.97", True),
        ("unexpected key x", True),
        ("loaded 3 modules", False),
        ("loaded 27 modules", False),
        ("loaded 26 of 28 modules", True),
        ("loaded 28/28 modules", False),
        ("reading /tmp/other/file", False),
        ("loading finished", False),
    ],
)
def test_a_line_says_something_when_it_is_new_and_complains_or_counts_less(line: str, says: bool) -> None:
    usual = ("loaded 28 modules", "reading /tmp/a/b")
    assert _says(line, usual) is says


def test_of_a_loader_that_loads_the_wrong_thing_silence_is_said_to_be_untried() -> None:
    found = check_loader(transposed, formats=["kohya"], benches=["qwen-image-fused"], max_examples=2)
    (untried,) = [verdict for verdict in found if verdict.check == "silence"]
    assert (untried.outcome, untried.title) == ("skipped", "not judged")
    assert untried.reason == "of a loader that loads the wrong thing nobody can say what it did with the rest"
