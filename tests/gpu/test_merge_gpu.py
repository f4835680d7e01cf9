"""Loader equals PEFT on CUDA, in float32, bfloat16 and float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.checks.cell import Cell
from harness.checks.trial_files import write_example
from harness.example import Example, Target
from harness.images.sampling import determinism
from harness.loaders.protocol import CORE_BENCHES
from harness.loaders.registry import installed, resolve
from harness.measure.compare import fit
from harness.measure.effective import effective_weights
from tests.peft_factors import peft_merged_weights

pytestmark = pytest.mark.gpu

CELLS = [
    (each.name, form, bench)
    for each in installed()
    if each.available and each.name != "diffsynth-2.0.4"
    for form, bench in resolve(each.name).cells
    if bench in CORE_BENCHES
]
SHAPES = ((8, 16.0), (3, 0.75), (16, 4.0), (64, 24.0), (1, 2.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "form", "bench_name"), CELLS)
def test_a_loader_merges_on_the_gpu_as_peft_does(
    cuda: Any, tmp_path: Any, name: str, form: str, bench_name: str, dtype: str
) -> None:
    cell = Cell(resolve(name), form, bench_name)
    bench, variant = cell.bench, cell.variant
    targets = tuple(Target(layer, *SHAPES[i % len(SHAPES)]) for i, layer in enumerate(cell.targets))
    example = Example(targets, strength=0.75, dtype=dtype)
    before = effective_weights(bench.base(getattr(torch, dtype)), bench.layers)
    updates = variant.updates(example, cell.view, before)
    path = write_example(cell, example, updates, tmp_path)
    model = bench.build(getattr(torch, dtype)).to(cuda)
    with determinism():  # without TF32, in which cuDNN convolves by default: loralib merges by a convolution
        after = effective_weights(cell.subject.load(model, path, strength=0.75) or model, bench.layers)
    pairs = {t.name: (updates[t.name].parts["A"], updates[t.name].parts["B"], float(t.alpha or 0)) for t in targets}
    reference = peft_merged_weights(bench.build(getattr(torch, dtype)).to(cuda), pairs, strength=0.75)
    for t in targets:
        where = before[t.name], updates[t.name].direction, 0.75 * variant.scale(t)
        found = fit(where[0], after[t.name], where[1], expected=where[2], dtype=dtype)
        peft = fit(where[0], reference[t.name].double().cpu(), where[1], expected=where[2], dtype=dtype)
        assert found.scale_right, f"{t.name}: scale {found.scale:.6f}, but should be {found.expected:.6f}"
        assert found.direction_right, f"{t.name}: residual {found.residual:.2e}"
        assert peft.scale_right
        assert peft.direction_right
