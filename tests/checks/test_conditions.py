"""Under the conditions that loaders meet: modes, later forwards, copies, dtypes, names, patterns, files before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from harness import check_loader, loader
from harness.benches import get_bench
from harness.checks.cell import Cell, cells_of
from harness.checks.plan import Plan, planned
from harness.checks.trial_files import write_example
from harness.checks.unloaded import base_weights
from harness.example import Patterns
from harness.files import read_lora
from harness.isolation.limits import Limits
from harness.loaders.registry import resolve
from harness.selftest.cases import Case, broken_cases, correct_cases
from harness.selftest.measure import measure
from tests.checks.sample_loaders import loader_with, right

CONDITIONS = [case for case in broken_cases() if case.name.startswith(("conditions:", "names:", "patterns:"))]
STEADY = ("train_mode", "adapter_dtype", "lazy", "functional_call", "low_memory")


def _one_of_each_code() -> list[Any]:
    """Return the cases, those whose code an earlier one has as slow tests."""
    seen: set[str] = set()
    params = []
    for case in CONDITIONS:
        again = case.fault is not None and case.fault.codes[0] in seen
        seen |= {case.fault.codes[0]} if case.fault else set()
        params.append(pytest.param(case, id=case.name, marks=[pytest.mark.slow] if again else []))
    return params


@pytest.mark.parametrize("case", _one_of_each_code())
def test_one_example_is_enough_for_what_depends_on_a_condition(case: Case) -> None:
    (result,) = measure([case], max_examples=1, seeds=(), limits=Limits(seconds=10, workers=1))
    assert result.named, "\n".join(verdict.text() for verdict in result.violations)


def test_an_effect_as_small_as_the_rounding_of_answers_is_not_another_after_a_cast() -> None:
    (faint,) = (case for case in broken_cases() if case.name == "scale_laws:input_width")
    (result,) = measure([faint], max_examples=1, seeds=(), limits=Limits(seconds=10, workers=1))
    assert {verdict.code for verdict in result.violations} == {"LH209"}


@pytest.mark.parametrize("case", [c for c in correct_cases() if c.name in STEADY], ids=lambda case: case.name)
def test_a_loader_that_is_right_in_every_state_is_never_blamed(case: Case) -> None:
    where = {"formats": ("kohya",), "benches": ("qwen-image-fused",)}
    (result,) = measure([case], max_examples=1, limits=Limits(seconds=10, workers=1), **where)
    assert result.right, "\n".join(verdict.text() for verdict in result.violations)


@pytest.mark.parametrize("uniform", [False, True])
def test_the_planned_examples_have_every_dtype_of_model_and_file(uniform: bool) -> None:
    cell = Cell(resolve(right), "kohya", "qwen-image")
    drawn = list(planned(cell, uniform=uniform))
    for name in ("dtype", "file_dtype"):
        assert {getattr(example, name) for example in drawn} == {"float32", "bfloat16", "float16"}
    assert {e.file_dtype for e in drawn if e.dtype == "float32"} == {"float32", "bfloat16", "float16"}


def test_no_rank_is_the_most_common_one_of_all_mixed_files() -> None:
    drawn = [e for e in planned(Cell(resolve(right), "kohya", "qwen-image")) if len({t.rank for t in e.targets}) > 1]
    common = {Counter(t.rank for t in example.targets).most_common(1)[0][0] for example in drawn}
    assert len(common) > 1


def test_who_declares_qwen_image_is_tried_on_twelve_blocks_in_one_format() -> None:
    cells, _ = cells_of(resolve(right))
    assert [(c.format, c.variant_name) for c in cells if c.bench_name == "qwen-image-deep"] == [("peft", "lora")]
    assert all(c.bench_name == "flux" for c in cells_of(resolve(right), benches=["flux"])[1])
    blocks = {name.split(".")[1] for name in get_bench("qwen-image-deep").lora_layers}
    assert blocks == {str(number) for number in range(12)}
    deep = next(c for c in cells if c.bench_name == "qwen-image-deep")
    assert Plan().examples_in(deep) == 10
    assert len(Plan().layers_in(deep)) == 8


@pytest.mark.parametrize("form", ["peft", "diffusers"])
@pytest.mark.parametrize("bench", ["qwen-image", "qwen-image-deep", "flux", "clip-text"])
def test_patterns_in_every_style_mean_what_peft_takes_them_for(form: str, bench: str, tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    cell = Cell(resolve(right), form, bench)
    drawn = list(planned(cell))
    assert {example.patterns for example in drawn} == set(get_args(Patterns))
    for number, example in enumerate(drawn[:6]):
        style = example.patterns
        updates = cell.variant.updates(example, cell.view, cell.view.gather(base_weights(cell.bench, "float32")))
        path = write_example(cell, example, updates, tmp_path / str(number))
        adapter = read_lora(path)
        wanted = {target.name: (target.rank, target.alpha) for target in example.targets}
        assert {name: (module.rank, module.alpha) for name, module in adapter.modules.items()} == wanted
        if form == "peft":
            config = json.loads((path / "adapter_config.json").read_text())
            table = config["alpha_pattern"]
            found = {name: table.get(get_pattern_key(table, name), config["lora_alpha"]) for name in wanted}
            assert found == {name: alpha for name, (_, alpha) in wanted.items()}
            assert (style == "names") == all(key.startswith("^") for key in table)


def test_a_format_without_a_configuration_has_no_patterns() -> None:
    assert {e.patterns for e in planned(Cell(resolve(right), "kohya", "qwen-image"))} == {"names"}


@pytest.mark.parametrize(("factor", "codes"), [(1.0, []), (1.5, ["LH209"])])
def test_a_loader_that_takes_models_of_one_dtype_is_checked_in_that(factor: float, codes: list[str]) -> None:
    scaled = loader_with(lambda strength, module, every: factor * strength * module.trained_scale)

    @loader(formats={"kohya"}, benches={"qwen-image"}, dtypes={"bfloat16"})
    def load(model: Any, lora: Path, *, strength: float = 1.0) -> None:
        if next(model.parameters()).dtype != torch.bfloat16:
            raise NotImplementedError("only bfloat16")
        scaled(model, lora, strength=strength)

    verdicts = check_loader(load, benches=["qwen-image"], max_examples=3, limits=Limits(seconds=10, workers=1))
    assert [verdict.code for verdict in verdicts if not verdict.ok] == codes


@pytest.mark.slow
def test_a_loader_that_takes_files_of_one_dtype_is_checked_with_those() -> None:
    @loader(formats={"kohya"}, benches={"qwen-image"}, file_dtypes={"float32"})
    def load(model: Any, lora: Path, *, strength: float = 1.0) -> None:
        if any(module.dtype != "F32" for module in read_lora(lora).modules.values()):
            raise NotImplementedError("only float32")
        right(model, lora, strength=strength)

    verdicts = check_loader(load, benches=["qwen-image"], max_examples=9, limits=Limits(seconds=10, workers=1))
    assert [verdict.code for verdict in verdicts if not verdict.ok] == []
    assert {tuple(v.data["file_dtypes"]) for v in verdicts if "file_dtypes" in v.data} == {("float32",)}
