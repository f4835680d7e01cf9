"""Every fault is found and named; a right loader is never blamed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness import Verdict, check_loader, loader
from harness.checks.cell import cells_of
from harness.checks.plan import Pins, Plan
from harness.checks.run import Limits, check_cells
from harness.errors import UserError
from harness.example import Target
from harness.loaders.registry import resolve
from tests.checks import sample_loaders as loaders

QUICK = {
    "formats": ["kohya"],
    "benches": ["qwen-image-fused"],
    "max_examples": 25,
    "limits": Limits(seconds=5, workers=1),
}


def violations(load: Callable[..., object], **options: object) -> list[Verdict]:
    return [v for v in check_loader(load, **{**QUICK, **options}) if not v.ok]  # type: ignore[arg-type]


FAULTS = {
    "raw_alpha": ("LH201", "strength * alpha"),
    "alpha_ignored": ("LH202", "strength"),
    "root_of_rank": ("LH203", "strength * alpha / sqrt(rank)"),
    "first_alpha": ("LH204", "strength * alpha(first) / rank"),
    "truncated": ("LH205", "strength * trunc(alpha) / rank"),
    "strength_ignored": ("LH207", "alpha / rank"),
    "zero_is_one": ("LH207", "(strength or 1) * alpha / rank"),
    "one_per_cent": ("LH209", "1.01 * strength * alpha / rank"),
    "second_module": ("LH207", None),
    "fused_rank": ("LH208", "0.3333 * strength * alpha / rank"),
    "no_effect": ("LH101", None),
    "skips_mlp": ("LH102", None),
    "transposed": ("LH301", None),
    "swapped_slices": ("LH302", None),
    "rounded_alpha": ("LH205", "strength * bfloat16(alpha) / rank"),
    "rounded_strength": ("LH207", "bfloat16(strength) * alpha / rank"),
    "touches_norm": ("LH401", None),
    "loses_the_bias": ("LH401", None),
    "adds_a_constant": ("LH401", None),
    "changes_the_default_dtype": ("LH401", None),
    "rewrites_file": ("LH404", None),
    "grows_on_second_load": ("LH402", None),
    "half_precision": ("LH501", None),
    "makes_nan": ("LH502", None),
    "raises": ("LH901", None),
    "returns_rubbish": ("LH902", None),
    "exits": ("LH901", None),
    "dies": ("LH901", None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str) -> None:
    code, formula = FAULTS[name]
    found = violations(getattr(loaders, name))
    beside = {"no_effect": ["LH103"]}.get(name, [])  # what has no effect drops all that it does not know, too
    assert [v.code for v in found] == [code, *beside], "\n".join(v.text() for v in found)
    if formula:
        assert found[0].law is not None
        assert formula in (found[0].law.formula, *found[0].law.alternatives)


@pytest.mark.parametrize("name", ["right", "prints"])
def test_a_right_loader_is_not_blamed(name: str) -> None:
    verdicts = check_loader(getattr(loaders, name), **{**QUICK, "formats": None, "benches": None})  # type: ignore[arg-type]
    assert all(v.outcome == "passed" for v in verdicts), "\n".join(v.text() for v in verdicts if not v.ok)
    formats, benches = ("peft", "kohya", "diffusers", "diffsynth"), ("qwen-image", "qwen-image-fused")
    deep = {("peft", "qwen-image-deep")}  # twelve blocks test names, in one format
    assert {(v.format, v.bench) for v in verdicts} == {(form, bench) for form in formats for bench in benches} | deep


@pytest.mark.parametrize(("name", "trait"), [("only_rank_one", "rank = 1"), ("high_rank", "rank > 64")])
def test_a_fault_under_one_condition_is_named_with_it(name: str, trait: str) -> None:
    (found,) = violations(getattr(loaders, name), max_examples=80)
    assert trait in found.title


def test_a_hang_costs_one_errored_verdict_and_not_the_run() -> None:
    (found,) = violations(loaders.hangs, limits=Limits(seconds=1, workers=1))
    assert (found.outcome, found.code) == ("errored", "LH901")
    assert "time limit" in found.text()


def test_the_counterexample_is_simple() -> None:
    (found,) = violations(loaders.alpha_ignored)
    assert found.counterexample is not None
    ((_, module),) = found.counterexample["modules"].items()
    assert module == {"rank": 2, "alpha": 1.0}
    assert found.counterexample["strength"] == 1.0
    assert found.counterexample["dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_per_cent_is_found_in_either_dtype(dtype: str) -> None:
    cells, _ = cells_of(resolve(loaders.one_per_cent), ["kohya"], ["qwen-image"])
    plan = Plan(pins=Pins(rank=8, alpha=24.0, dtype=dtype))
    bad = [v for v in check_cells(cells, plan, Limits(workers=1)) if not v.ok]
    assert [v.code for v in bad] == ["LH209"]


@pytest.mark.parametrize(
    ("form", "pins", "says"),
    [
        ("bfl-control", Pins(alpha=2.0), "has no place for alpha"),
        ("mlx", Pins((Target("transformer.h.0.attn.c_attn", 4, 8.0), Target("lm_head", 3, 8.0))), "rank is 4 and 3"),
        ("peft", Pins((Target("lm_head", 4, None),)), "always has an alpha"),
        ("kohya", Pins((Target("lm_head", 4, 8.0),) * 2), "is named 2 times"),
    ],
)
def test_a_pin_that_no_file_can_say_is_no_loader_that_raises(form: str, pins: Pins, says: str) -> None:
    bench = "flux" if form == "bfl-control" else "gpt2"
    cells, _ = cells_of(resolve(loaders.right), [form], [bench])
    with pytest.raises(UserError, match=says):
        check_cells(cells, Plan(pins=pins), Limits(workers=1))


@loader(benches={"sd-unet"}, variants={"conv"})
def only_convolutions(model: object, lora: object, *, strength: float = 1.0) -> None:
    raise NotImplementedError


def test_what_is_not_looked_at_without_plain_lora_is_said() -> None:
    _, skipped = cells_of(resolve(only_convolutions))
    assert ["neither plain LoRA" in (each.reason or "") for each in skipped] == [True]


def test_the_same_seed_draws_the_same_counterexample() -> None:
    first, second = (violations(loaders.first_alpha)[0].reproduce for _ in range(2))
    assert first == second
