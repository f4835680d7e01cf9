"""The text form of a record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fixtures.build_malformed import CASES, Case, build
from harness.doctor import inspect_file
from harness.doctor.show import text
from harness.files import LoraWeights, write_lora


def test_the_founding_file_is_shown_with_the_strength_to_pass(tmp_path: Path) -> None:
    modules = {f"blocks.{i}.to_qkv": LoraWeights(torch.ones(32, 8), torch.ones(24, 32), 16.0) for i in range(2)}
    shown = text(inspect_file(write_lora(tmp_path / "x", "diffsynth", modules)))
    for line in (
        "format    diffsynth, 2 modules",
        "rank      32",
        "alpha     16 (from: tensor)",
        "trained   scale 0.5 on B @ A",
        "read as   alpha / rank: 0.5; alpha / sqrt(rank): 2.828; alpha: 16; 1: 1",
        "hazard    none",
        "diffsynth-2.0.4: alpha = 0.5",
        "raw alpha: strength = 0.03125",
    ):
        assert line in shown, shown


def test_energies_show_the_strongest_modules(tmp_path: Path) -> None:
    modules = {f"b.{i}": LoraWeights(torch.ones(2, 8), (i + 1) * torch.ones(8, 2), 2.0) for i in range(8)}
    shown = text(inspect_file(write_lora(tmp_path / "x", "diffsynth", modules), energy=True))
    assert "energy    b.7: ||ΔW|| 128, largest singular value 128, effective rank 1" in shown
    assert "and 3 weaker modules" in shown


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_file_can_reach_the_terminal_with_control_characters(tmp_path: Path, case: Case) -> None:
    assert text(inspect_file(build(case, tmp_path))).replace("\n", "").isprintable()


def test_a_file_name_of_arbitrary_bytes_is_shown_and_recorded(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"x": LoraWeights(torch.ones(2, 8), torch.ones(8, 2), 2.0)})
    odd = path.rename(tmp_path / "\udcff\x1b[2J.safetensors")
    record = inspect_file(odd)
    assert record.format == "kohya"
    assert record.model_dump_json()
    assert text(record).replace("\n", "").isprintable()
