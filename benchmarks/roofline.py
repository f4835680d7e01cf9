"""What bounds the energies of a file on one thread: its bytes, its products and LAPACK, each at its best here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tools import GIGA, best, table
from harness.files import read_lora

_COLUMNS, _RANK = 3072, 64


def floor(path: Path) -> tuple[list[str], float]:
    """Return GB, GFLOP and the seconds of each part for one file, and the sum of these."""
    adapter = read_lora(path)
    largest = max(info.elements for info in adapter.file.tensors.values())
    room = torch.empty(largest)

    def read() -> None:
        for key, info in adapter.file.tensors.items():
            room[: info.elements].copy_(adapter.file.tensor(key).flatten())

    modules = adapter.modules.values()
    ranks = Counter(m.rank for m in modules)
    flops = dict.fromkeys(ranks, 0)
    for m in modules:
        flops[m.rank] += m.rank * (m.rank + 1) * (m.in_features + m.out_features)
    seconds = [
        best(read),
        sum(flops[rank] / speed(rank) for rank in ranks),
        sum(n * lapack(rank) for rank, n in ranks.items()),
    ]
    size = path.stat().st_size
    shown = [f"{size / GIGA:.2f}", f"{sum(flops.values()) / GIGA:.0f}", *(f"{each:.2f}" for each in seconds)]
    return shown, sum(seconds)


def speed(rank: int) -> float:
    """Return the most float32 operations a second of a symmetric product of that rank, its data in the cache.

    Narrow products are slower than the square ones that peaks are quoted for: a third as fast at rank 18.
    """
    rows = torch.randn(rank, _COLUMNS)
    columns = rows.t().contiguous()
    wide, tall = rows.numpy(), columns.numpy()
    ways = (lambda: wide @ wide.T, lambda: tall.T @ tall, lambda: rows @ rows.t(), lambda: columns.t() @ columns)
    return rank * (rank + 1) * _COLUMNS / min(map(best, ways))


def lapack(rank: int) -> float:
    """Return the seconds for one module: a Cholesky factor, two products and eigenvalues of [rank, rank] in float64."""
    halves = torch.randn(4, 2 * rank, rank, dtype=torch.float64)
    grams = halves.mT @ halves

    def work() -> Tensor:
        root = torch.linalg.cholesky_ex(grams)[0]
        return torch.linalg.eigvalsh(root.mT @ grams @ root)

    return best(work, 5) / len(grams)


def products() -> list[str]:
    """Compare ways to the Gram matrix of one bfloat16 half."""
    half = torch.randn(_COLUMNS, _RANK).bfloat16()
    exact = half.double().t() @ half.double()
    wide = half.float()
    array = wide.numpy()
    ways: dict[str, Callable[[], object]] = {
        "converted, numpy's symmetric product in float32": lambda: array.T @ array,
        "converted, torch's product in float32": lambda: wide.t() @ wide,
        "torch's product of bfloat16": lambda: half.t() @ half,
        "the same with `out_dtype=torch.float32`": lambda: torch.mm(half.t(), half, out_dtype=torch.float32),
    }
    rows = [[name, *_tried(way, exact)] for name, way in ways.items()]
    return table([f"Gram matrix of {_COLUMNS} x {_RANK} in bfloat16", "µs", "largest error / largest element"], rows)


def _tried(way: Callable[[], object], exact: Tensor) -> list[str]:
    try:
        found = torch.as_tensor(way())
    except (NotImplementedError, RuntimeError, TypeError):
        return ["torch has none for a processor", ""]
    error = (found.double() - exact).abs().max() / exact.max()
    return [f"{1e6 * best(way, 15):.0f}", f"{float(error):.0e}"]
