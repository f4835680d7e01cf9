"""A full verify on a GPU against its copy bandwidth, and a sweep: `python -m benchmarks.gpu` writes benchmarks/gpu.md.

The weights lie in the device's memory, as many layers as have the parameters of a model of the 20 B class; a verify of
files on disk is bound by the disk and the bus instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tools import GIGA, judged, table
from harness.isolation.device import cuda_devices, no_device

if TYPE_CHECKING:
    from torch import Tensor

REPORT = Path(__file__).parent / "gpu.md"
PARAMETERS = 20e9
SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (9216, 3072))
RANKS, RANKS_OF_AIM = (16, 32, 64, 128), 32
LEAST = 0.5
COPIED = 1 << 32  # bytes


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the time of one call after one that warms up."""
    import torch

    work()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def copy_bandwidth(device: str) -> float:
    """Return the bytes a second that a copy reads and writes."""
    import torch

    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / min(seconds(lambda: target.copy_(source), device) for _ in range(5))


def verify(pairs: list[tuple[Tensor, Tensor]], rank: int, device: str) -> float:
    """Return the bytes a second that a full verify reads."""
    import torch

    from harness.doctor.verify.row_products import row_products

    rights = {columns: torch.randn(rank, columns) for columns in {before.shape[1] for before, _ in pairs}}
    read = sum(2 * before.nbytes for before, _ in pairs)
    times = round(4 * PARAMETERS / read)

    def work() -> None:
        for _ in range(times):
            for before, after in pairs:
                row_products(
                    lambda start, stop, w=before: w[start:stop],  # type: ignore[misc]
                    lambda start, stop, w=after: w[start:stop],  # type: ignore[misc]
                    rights[before.shape[1]], rows=len(before), bfloat16=True, device=device,
                )  # fmt: skip

    return times * read / seconds(work, device)


def main() -> int:
    """Measure, print and write the table; 2 where there is no GPU."""
    if not cuda_devices():
        print(f"nothing was measured: {no_device()}", file=sys.stderr)
        return 2
    from benchmarks.image_sweep import main as sweep

    text = "\n".join([measured("cuda"), *sweep(["--device", "cuda", "--dtype", "bfloat16"]), ""])
    print(text)
    REPORT.write_text(text, encoding="utf-8")
    return 0


def measured(device: str) -> str:
    import torch

    bandwidth = copy_bandwidth(device)
    bases = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in SHAPES for _ in range(8)]
    pairs = [(base, base + 0.01 * torch.randn_like(base)) for base in bases]
    rows = []
    for rank in RANKS:
        speed = verify(pairs, rank, device)
        share = f"{speed / bandwidth:.0%}"
        shown = judged(share, met=speed >= LEAST * bandwidth) if rank <= RANKS_OF_AIM else share
        rows.append([str(rank), f"{4 * PARAMETERS / speed:.2f}", f"{speed / GIGA:,.0f}", shown])
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at {bandwidth / GIGA:,.0f} GB/s"
    head = ["rank", "20 B parameters, s", "GB/s read", f"of the copy bandwidth, aim {LEAST:.0%} up to {RANKS_OF_AIM}"]
    return "\n".join(["# Full verify on a GPU", "", f"{machine}; base and merged in bfloat16.", "", *table(head, rows)])


if __name__ == "__main__":
    sys.exit(main())
