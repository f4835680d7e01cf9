"""||ΔW|| and every singular value of a LoRA file, against one pass over its bytes and against the dense update."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.tools import best, best_of, judged, table
from harness.doctor.energy import pair_energy

# name -> shapes to draw from, rank, most passes over the bytes
FAMILIES = {
    "Qwen-Image-like": ([(3072, 3072), (12288, 3072), (3072, 12288)], 32, 1.5),
    "FLUX-like": ([(3072, 3072), (9216, 3072), (12288, 3072), (3072, 15360)], 64, 1.5),
    "SDXL-like": ([(1280, 1280), (640, 640), (10240, 1280), (1280, 5120)], 128, 4.0),
}
LAYERS = 6
LEAST_DENSE, LEAST_SVD = 100, 1000
_SVD = 3072


def energies(seed: int) -> list[str]:
    head = ["file", "rank", "MB", "ms", "passes over the bytes as float32", "dense norm /"]
    return table(head, [energy_row(name, seed) for name in FAMILIES])


def energy_row(name: str, seed: int) -> list[str]:
    shapes, rank, most = FAMILIES[name]
    drawn = random.Random(seed).choices(shapes, k=LAYERS)
    pairs = [(torch.randn(rank, i).bfloat16(), torch.randn(o, rank).bfloat16()) for o, i in drawn]
    size = sum(half.numel() * 2 for pair in pairs for half in pair) / 1e6
    seconds = best_of(
        {
            "pass": lambda: [half.float().abs().mean() for pair in pairs for half in pair],
            "ours": lambda: [pair_energy(a, b, 0.5) for a, b in pairs],
        },
        5,
    )
    dense = best(lambda: [dense_norm(a, b) for a, b in pairs], 1) / seconds["ours"]
    passes = seconds["ours"] / seconds["pass"]
    shown = judged(f"{dense:.0f}", met=dense >= LEAST_DENSE) if rank == 32 else f"{dense:.0f}"
    return [
        name, str(rank), f"{size:.0f}", f"{1e3 * seconds['ours']:.1f}",
        judged(f"{passes:.2f}, aim {most:g}", met=passes <= most), shown,
    ]  # fmt: skip


def dense_norm(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(b.float() @ a.float(), dtype=torch.float64))


def svd() -> list[str]:
    a, b = torch.randn(64, _SVD), torch.randn(_SVD, 64)
    ours = best(lambda: pair_energy(a, b, 1.0), 5)
    ratio = best(lambda: torch.linalg.svdvals(b @ a), 1) / ours
    head = [f"singular values of one {_SVD} x {_SVD} layer, rank 64", "dense SVD /"]
    return table(head, [[f"{1e3 * ours:.2f} ms", judged(f"{ratio:,.0f}", met=ratio >= LEAST_SVD)]])


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    aims = f"1.5 passes up to rank 64 and 4 at rank 128, {LEAST_DENSE} times quicker than the dense norm on the first"
    aims += f", {LEAST_SVD:,} times quicker than a dense SVD"
    head = f"Aims: {aims}. {LAYERS} layers each, drawn from the shapes of real models."
    return ["## Energies: ||ΔW|| and every singular value", "", head, "", *energies(0), *svd()]


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
