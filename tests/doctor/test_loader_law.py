"""The strength to pass to a loader is measured on files like the one at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from harness.cli import main
from harness.doctor.loader_law import measured_prescription
from harness.doctor.traits import Traits
from harness.files import LoraParts, LoraWeights, read_lora, write_lora
from harness.fixtures import fixtures_folder
from harness.loaders.registry import installed

RAW_ALPHA = str(Path(__file__).parents[2] / "examples" / "raw_alpha.py") + ":load"
STABILISED = fixtures_folder() / "loras" / "r16_a4_rslora" / "peft"
AVAILABLE = {each.name for each in installed() if each.available}


def prescribed(loader: str, path: Path, *, lora_alpha: float | None = None) -> float | None:
    return measured_prescription(loader, Traits(read_lora(path, strict=False)), lora_alpha=lora_alpha)


def pair(rank: int, alpha: float | None) -> LoraWeights:
    return LoraWeights(torch.randn(rank, 8), torch.randn(8, rank), alpha)


def write(folder: Path, format: str, modules: Mapping[str, LoraWeights | LoraParts]) -> Path:
    return write_lora(folder / "lora.safetensors", format, modules)


def test_a_rank_stabilised_file_is_measured_as_one() -> None:
    assert prescribed(RAW_ALPHA, STABILISED) == 0.25  # alpha 4, rank 16: trained 4 / sqrt(16) = 1, given 4
    assert prescribed("peft", STABILISED) == 1.0


@pytest.mark.skipif("lycoris" not in AVAILABLE, reason="lycoris is not installed here")
def test_a_whole_difference_beside_pairs_leaves_a_right_loader_right(tmp_path: Path) -> None:
    modules = {"a": pair(4, 2.0), "b": pair(4, 2.0), "c": LoraParts({"diff": torch.randn(8, 8)})}
    path = write(tmp_path, "kohya", modules)
    assert prescribed("lycoris", path) == 1.0
    assert prescribed(RAW_ALPHA, path) is None  # 1 / 4 for the pairs, 1 for the difference


def test_a_file_without_alpha_is_measured_without_alpha(tmp_path: Path) -> None:
    path = write(tmp_path, "diffsynth", {"a": pair(32, None)})
    assert prescribed(RAW_ALPHA, path) is None
    assert prescribed(RAW_ALPHA, path, lora_alpha=16.0) == 0.5  # read as scale 1, trained 16 / 32


def test_a_format_that_a_loader_does_not_read_is_not_answered(tmp_path: Path) -> None:
    assert prescribed("peft", write(tmp_path, "kohya", {"a": pair(4, 2.0)})) is None


@pytest.mark.skipif("diffusers" not in AVAILABLE, reason="diffusers is not installed here")
def test_a_loader_that_is_known_to_lose_the_file_is_given_no_number_of_another_model(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{n}.attn.{part}" for n in range(2) for part in ("to_q", "add_k_proj")]
    pairs = {name: LoraWeights(torch.randn(4, 6144), torch.randn(6144, 4), None) for name in names}
    path = write(tmp_path, "diffsynth", pairs)
    done = CliRunner().invoke(main, ["inspect", str(path), "--loader", "diffusers", "--lora-alpha", "4"])
    assert "no number: loads none of its modules, without an error" in " ".join(done.output.split()), done.output
