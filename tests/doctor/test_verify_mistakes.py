"""What a merger did wrong has its name: another module's update, rows exchanged, components of the rank left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor.verify.verify import MergeReport, verify_merge
from harness.files import LoraWeights, write_lora

NAMES = [f"blocks.{block}.attn.qkv" for block in range(4)]
ROWS, COLUMNS, RANK, ALPHA = 192, 128, 8, 16.0
Halves = dict[str, tuple[Tensor, Tensor]]
Merger = Callable[[Halves], dict[str, Tensor]]  # of A: [r, in] and B: [out, r], to what is added at scale 1


def plain(halves: Halves) -> dict[str, Tensor]:
    return {name: b @ a for name, (a, b) in halves.items()}


def shifted(halves: Halves) -> dict[str, Tensor]:
    updates = list(plain(halves).values())
    return dict(zip(NAMES, updates[1:] + updates[:1], strict=True))


def in_order(*order: int) -> Merger:
    return lambda halves: {
        name: torch.cat([update.chunk(len(order))[part] for part in order]) for name, update in plain(halves).items()
    }


def reordered(order: Callable[[Tensor], Tensor]) -> Merger:
    """Take the rows of each update in another order: that of the rows 0, 1, ... once `order` is done."""
    return lambda halves: {name: update[order(torch.arange(ROWS))] for name, update in plain(halves).items()}


def in_turns(head: int, parts: int = 3) -> Merger:
    return reordered(lambda rows: rows.reshape(parts, -1, head).transpose(0, 1).flatten())


def together(head: int, parts: int = 3) -> Merger:
    return reordered(lambda rows: rows.reshape(-1, parts, head).transpose(0, 1).flatten())


def as_pairs(head: int) -> Merger:
    return reordered(lambda rows: rows.reshape(-1, 2, head // 2).mT.flatten())


def as_halves(head: int) -> Merger:
    return reordered(lambda rows: rows.reshape(-1, head // 2, 2).mT.flatten())


def without(*components: int) -> Merger:
    kept = [component for component in range(RANK) if component not in components]
    return lambda halves: {name: b[:, kept] @ a[kept] for name, (a, b) in halves.items()}


def another(halves: Halves) -> dict[str, Tensor]:
    """Merge a LoRA that nobody gave."""
    return {name: torch.randn(ROWS, RANK) @ torch.randn(RANK, COLUMNS) * 1e-3 for name in halves}


def verified(folder: Path, merger: Merger, *, full: bool, dtype: torch.dtype = torch.bfloat16) -> MergeReport:
    torch.manual_seed(4)
    base = {f"{name}.weight": (torch.randn(ROWS, COLUMNS) * 0.02).to(dtype) for name in NAMES}
    halves = {name: (torch.randn(RANK, COLUMNS), torch.randn(ROWS, RANK) * 1e-3) for name in NAMES}
    added = {f"{name}.weight": update for name, update in merger(halves).items()}
    merged = {key: (weight.float() + ALPHA / RANK * added[key]).to(dtype) for key, weight in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(merged, folder / "merged.safetensors")
    lora = write_lora(
        folder / "lora.safetensors", "diffsynth", {name: LoraWeights(a, b, ALPHA) for name, (a, b) in halves.items()}
    )
    return verify_merge(folder / "base.safetensors", folder / "merged.safetensors", lora, full=full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("merger", "code", "says"),
    [
        (shifted, "LH104", "blocks.0.attn.qkv holds that of blocks.1.attn.qkv"),
        (in_order(1, 0), "LH302", "the halves of its rows got the updates of 2 1"),
        (in_order(0, 2, 1), "LH302", "the thirds of its rows got the updates of 1 3 2"),
        (in_order(1, 2, 0), "LH302", "the thirds of its rows got the updates of 2 3 1"),
        (in_turns(16), "LH302", "its rows got the updates of the thirds in turns, 16 rows of each"),
        (together(16), "LH302", "the thirds of its rows got what belongs to 16 rows of each in turns"),
        (in_turns(8, 2), "LH302", "its rows got the updates of the halves in turns, 8 rows of each"),
        (as_pairs(64), "LH302", "in each head of 64 rows the updates of the halves alternate"),
        (as_halves(48), "LH302", "in each head of 48 rows the halves got the updates of alternate rows"),
        (without(7), "LH304", "merged without component 7 of the 8 of its rank"),
        (without(0, 4, 5, 6, 7), "LH304", "merged without components 0, 4 to 7 of the 8 of its rank"),
    ],
)
def test_a_merger_s_mistake_has_its_name(tmp_path: Path, merger: Merger, code: str, says: str, full: bool) -> None:
    report = verified(tmp_path, merger, full=full)
    assert (report.exit_code, report.overall.code) == (1, code), report.overall.text()
    assert says in report.overall.text()
    assert {verdict.code for verdict in report.modules} == {code}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_lora_is_none_of_these_mistakes(tmp_path: Path, dtype: torch.dtype) -> None:
    report = verified(tmp_path, another, full=False, dtype=dtype)
    assert (report.exit_code, report.overall.code) == (1, "LH101"), report.overall.text()


def test_a_right_merge_is_right(tmp_path: Path) -> None:
    assert verified(tmp_path, plain, full=True).exit_code == 0
