"""Every run asks PEFT itself: its merge agrees with the closed form, and turns the run red where it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from harness.checks import reference
from harness.checks.cell import Cell, cells_of
from harness.checks.reference import SelfCheck, ask_peft
from harness.cli import main
from harness.errors import LoaderSpecError
from harness.loaders.registry import resolve
from harness.variants import table as low_rank
from harness.variants.variant import Variant
from tests.checks import sample_loaders as loaders

pytest.importorskip("peft")
NUMBER = version("peft")
RAW = str(Path(__file__).parents[2] / "examples" / "raw_alpha.py") + ":load"


def cells(*variants: str, bench: str = "qwen-image", form: str = "peft") -> list[Cell]:
    return [Cell(resolve(loaders.right), form, bench, variant) for variant in variants]


def asked(*variants: str, bench: str = "qwen-image", form: str = "peft") -> SelfCheck:
    return ask_peft(cells(*variants, bench=bench, form=form), workers=0)


PLACES = (
    ("qwen-image", ("lora", "rslora", "dora", "loha", "lokr", "lora-bias")),
    ("sd-unet", ("conv",)),
    ("gpt2", ("lora", "embedding")),
)


@pytest.mark.parametrize(("bench", "variants"), PLACES)
def test_peft_and_the_closed_form_agree_on_every_variant_peft_has(bench: str, variants: Sequence[str]) -> None:
    found = asked(*variants, bench=bench)
    assert [(place.bench, place.variant) for place in found.places] == [(bench, variant) for variant in variants]
    assert all(place.fault is None and 0 < place.apart < 5e-7 for place in found.places)
    assert found.verdicts == []


def test_the_line_of_a_run_says_version_distance_and_places() -> None:
    both, _ = cells_of(resolve(loaders.right))
    found = ask_peft(both)
    apart = f"{max(place.apart for place in found.places):.0e}".replace("e-0", "e-")
    assert str(found) == f"PEFT {NUMBER} agrees with the closed form to {apart} (3 benches, 1 variant)"


PERTURBED = (
    ("lora", Variant, "scale", lambda scale: lambda self, target: 1.001 * scale(self, target)),
    ("rslora", Variant, "scale", lambda scale: lambda self, target: (target.alpha or 1.0) / target.rank),
    ("lora", low_rank, "low_rank", lambda product: lambda a, b: product(a.flip(0), b)),
    ("dora", low_rank, "dora_weight", lambda weight: lambda w, delta, m: weight(w, 2 * delta, m)),
)


@pytest.mark.parametrize(("variant", "owner", "name", "change"), PERTURBED)
def test_a_closed_form_that_is_wrong_turns_the_run_red(
    variant: str, owner: Any, name: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells(variant)
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    if name == "low_rank":  # the rows of the table of variants hold the functions that call it
        assert cell.variant.direction is low_rank.pair_direction
    found = ask_peft([cell], workers=0)
    (verdict,) = found.verdicts
    assert (verdict.check, verdict.outcome) == ("reference", "failed")
    assert verdict.title.startswith(f"PEFT {NUMBER} and the closed form disagree on qwen-image, {variant}: ")
    assert str(found).startswith(f"PEFT {NUMBER} disagrees with the closed form")


def test_where_peft_itself_is_known_to_load_something_else_it_is_no_reference() -> None:
    found = asked("lora", bench="deepseek-v3")
    assert str(found) == "not run: no bench and variant here has one; no PEFT reference for deepseek-v3/lora"
    assert found.verdicts == []


@pytest.mark.parametrize("variant", ["tucker", "full"])
def test_a_variant_that_peft_cannot_say_is_named(variant: str) -> None:
    found = asked("conv", variant, bench="sd-unet", form="kohya")
    assert [place.variant for place in found.places] == ["conv"]
    assert str(found).endswith(f"; no PEFT reference for {variant}")
    alone = asked(variant, bench="sd-unet", form="kohya")
    assert str(alone) == f"not run: no bench and variant here has one; no PEFT reference for {variant}"


def test_without_peft_it_is_said_that_nothing_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise LoaderSpecError(f"{name}: peft is not installed; run `pip install peft`")

    given = cells("lora")
    monkeypatch.setattr(reference, "resolve", gone)
    found = ask_peft(given)
    assert str(found) == "not run: peft: peft is not installed; run `pip install peft`"
    assert found.verdicts == []


@pytest.mark.parametrize("load", [loaders.raises, loaders.dies, loaders.raw_alpha])
def test_a_peft_that_raises_dies_or_is_wrong_is_a_violation(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = cells("lora")
    monkeypatch.setattr(reference, "resolve", lambda name: resolve(load))
    assert [verdict.outcome for verdict in ask_peft(given, workers=1).verdicts] == ["failed"]


def test_check_prints_and_records_it() -> None:
    options = ["check", RAW, "--format", "kohya", "--bench", "qwen-image", "--max-examples", "1", "-j", "1"]
    lines = CliRunner().invoke(main, options).output.splitlines()
    (line,) = [line for line in lines if line.startswith("reference: ")]
    assert line.startswith(f"reference: PEFT {NUMBER} agrees with the closed form to ")
    recorded = json.loads(CliRunner().invoke(main, [*options, "--json"]).stdout.splitlines()[-1])
    assert f"reference: {recorded['reference']}" == line


def test_check_is_red_where_only_the_reference_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "resolve", lambda name: resolve(loaders.raw_alpha))
    spec = f"{loaders.__name__}:right"
    options = ["check", spec, "--format", "kohya", "--bench", "qwen-image", "--max-examples", "1", "-j", "1"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 1, done.output
    assert "and the closed form disagree on qwen-image, lora: delta is" in done.output
