"""A module or an element that is far larger than its like is seen; healthy adapters are not accused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.doctor import inspect_file
from harness.files import LoraWeights, write_lora

NAMES = ("blocks.{}.attn.to_q", "blocks.{}.attn.to_out.0", "blocks.{}.ff.net.2")


def lora(folder: Path, format: str, *, spread: float, freedom: float, seed: int, spoil: str = "") -> Path:
    torch.manual_seed(seed)
    pairs = {}
    for block in range(8):
        for name in NAMES:
            tails = (torch.distributions.Chi2(freedom).sample((64, 4)) / freedom).sqrt()
            b = torch.randn(64, 4) / tails * 0.02 * torch.exp(spread * torch.randn(()))
            pairs[name.format(block)] = LoraWeights(torch.randn(4, 64), b, 4.0)
    victim = pairs[NAMES[seed % 3].format(3)]
    if spoil == "module":
        victim.b.mul_(100)
    elif spoil == "element":
        victim.b[5, 1] = 10_000 * 0.02
    return write_lora(folder / "lora", format, pairs)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize(("spoil", "said"), [("module", "the whole module is"), ("element", "a few of its elements")])
def test_what_is_a_hundred_times_its_like_is_named(tmp_path: Path, format: str, spoil: str, said: str) -> None:
    for seed in range(10):
        record = inspect_file(lora(tmp_path / str(seed), format, spread=0.2, freedom=30.0, seed=seed, spoil=spoil))
        found = [hazard for hazard in record.hazards if hazard.code == "LH717"]
        assert len(found) == 1, (seed, record.hazards)
        assert said in found[0].what
        assert NAMES[seed % 3].format(3) in found[0].what.replace("_", ".").replace("to.", "to_")


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("freedom", [5.0, 30.0])
def test_healthy_adapters_are_not_accused(tmp_path: Path, spread: float, freedom: float) -> None:
    files = [lora(tmp_path / str(seed), "kohya", spread=spread, freedom=freedom, seed=seed) for seed in range(40)]
    accused = [file for file in files if "LH717" in inspect_file(file).codes]
    assert not accused
