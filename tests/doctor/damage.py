"""One large bf16 layer, merged right and then damaged in some rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.files import LoraWeights, write_lora

ROWS, COLUMNS, RANK, ALPHA = 4096, 1024, 16, 32
COUNTS = (1, 4, 16, 64, 256)
Damage = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows of W, of the update and of W' -> rows of the damaged W'

KINDS: dict[str, Damage] = {
    "unmerged": lambda base, update, merged: base,
    "doubled": lambda base, update, merged: (base.float() + 2 * update).to(base.dtype),
    "zeroed": lambda base, update, merged: torch.zeros_like(merged),
    "nan": lambda base, update, merged: _with_nan(merged),
    "noise": lambda base, update, merged: _noisy(merged),
}


def _with_nan(merged: Tensor) -> Tensor:
    """Return rows of which one element each is NaN: the least that a reader could overlook."""
    found = merged.clone()
    found[:, 517] = torch.nan
    return found


def _noisy(merged: Tensor) -> Tensor:
    """Return rows with noise of a tenth of their size."""
    noise = torch.randn(merged.shape, generator=torch.Generator().manual_seed(5))
    return (merged.float() + 0.1 * merged.float().std() * noise).to(merged.dtype)


def write_base(folder: Path, size: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Write the base and the LoRA; return W and the update, whose norm is `size` times that of W."""
    draw = torch.Generator().manual_seed(3)
    base = (torch.randn(ROWS, COLUMNS, generator=draw) * 0.02).to(dtype)
    a, b = torch.randn(RANK, COLUMNS, generator=draw), torch.randn(ROWS, RANK, generator=draw)
    b *= (0.25 + torch.rand(ROWS, 1, generator=draw)) * size * 0.02 / 2 / RANK**0.5
    save_file({"x.weight": base}, folder / "base.safetensors")
    write_lora(folder / "lora.safetensors", "diffsynth", {"x": LoraWeights(a, b, ALPHA)})
    return base, (ALPHA / RANK) * b @ a


def write_merged(folder: Path, base: Tensor, update: Tensor, kind: str = "", count: int = 0, start: int = 1000) -> Path:
    """Write the merge with `count` rows from `start` damaged."""
    merged = (base.float() + update).to(base.dtype)
    if count:
        rows = slice(start, start + count)
        merged[rows] = KINDS[kind](base[rows], update[rows], merged[rows])
    save_file({"x.weight": merged}, folder / "merged.safetensors")
    return folder / "merged.safetensors"
