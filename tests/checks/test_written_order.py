"""The order of a written file's modules, which laws like "the first module's alpha" depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.checks.cell import Cell, declared_cells
from harness.checks.plan import planned
from harness.checks.trial_files import TrialFiles, updates_of
from harness.files import match_modules, read_lora
from harness.loaders.registry import resolve


def _cells(name: str) -> list[Cell]:
    return [cell for cell in declared_cells(resolve(name)) if cell.bench_name in ("qwen-image", "flux", "sd-unet")]


CELLS = [cell for name in ("peft", "lycoris", "diffusers") for cell in _cells(name)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.subject.spec}-{cell.place}")
@pytest.mark.parametrize("key_seed", [0, 1, 3])
def test_the_order_is_what_a_reader_of_the_file_meets(cell: Cell, key_seed: int, tmp_path: Path) -> None:
    for number, drawn in enumerate(list(planned(cell))[:9:4]):
        example = replace(drawn, key_seed=key_seed, file_dtype=("float32", "bfloat16", "float16")[number])
        files = TrialFiles(cell, example, updates_of(cell, example), None, tmp_path / str(number))
        adapter = read_lora(files.example)
        names, _ = match_modules(adapter, cell.view.layers)
        assert files.order == tuple(names[name] for name in adapter.modules)
