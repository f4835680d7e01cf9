from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.benches import get_bench
from harness.loaders.registry import resolve

from .conftest import factors, trained, weights, written

EXAMPLES = Path(__file__).parents[2] / "examples"
MERGE = (
    f"cmd:'{sys.executable}' '{EXAMPLES / 'merge_cmd.py'}' --base {{base}} --lora {{lora}} "
    "--strength {strength} --out {out}"
)


@pytest.mark.parametrize("form", ["peft", "kohya", "diffusers", "diffsynth"])
def test_raw_alpha_multiplies_by_alpha_and_never_divides_by_the_rank(form, bench, tmp_path):
    model = bench.build()
    resolve(f"{EXAMPLES / 'raw_alpha.py'}:load").load(model, written(bench, form, tmp_path), strength=0.5)
    expected = {name: 0.5 * module.alpha for name, module in weights(bench).items()}
    assert factors(bench, model, weights(bench)) == pytest.approx(expected, rel=2e-5)


def test_raw_alpha_is_a_loader_of_fifteen_lines():
    lines = [line for line in (EXAMPLES / "raw_alpha.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 15


@pytest.mark.parametrize("form", ["peft", "kohya", "diffusers", "diffsynth"])
def test_the_command_example_merges_as_trained(form, tmp_path):
    bench = get_bench("qwen-image-fused")
    model = resolve(MERGE).load(bench.build(), written(bench, form, tmp_path), strength=-2.0)
    found = factors(bench, model, weights(bench))
    assert found == pytest.approx(trained(weights(bench), -2.0), rel=2e-5)


def test_the_command_example_takes_files_without_alpha_as_scale_one(bench, tmp_path):
    model = resolve(MERGE).load(bench.build(), written(bench, "kohya", tmp_path, alphas=(None, 6.0)))
    modules = weights(bench, alphas=(None, 6.0))
    assert factors(bench, model, modules) == pytest.approx(trained(modules, 1.0), rel=2e-5)
