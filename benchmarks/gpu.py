"""A full verify on a GPU, in its memory and of files, and a sweep: `python -m benchmarks.gpu` writes benchmarks/gpu.md.

In memory, as many layers as have the parameters of a model of the 20 B class are held against the copy bandwidth; of
files, the same command on the processor is the rival.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tools import GIGA, judged, table
from harness.isolation.device import cuda_devices, no_device

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = (
    "The change of a weight is written once and read twice again, so that reading both weights cannot pass 40 % of the "
    "copy bandwidth; below that it is Python that starts the kernels of one layer after the other. Files come through "
    "the processor, which compares some columns of every row itself: there a GPU gains nothing."
)
REPORT = Path(__file__).parent / "gpu.md"
PARAMETERS = 20e9
SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (9216, 3072))
RANKS, RANKS_OF_AIM = (16, 32, 64, 128), 32
LEAST = 0.5
PARTS = ("base", "merged", "lora")
COPIED = 1 << 32  # bytes
OF_FILES = 10  # layers of each shape: 2.3 GB of base, and as much merged


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

    factors = {
        shape: (torch.randn(shape[0], rank, device=device), torch.randn(rank, shape[1], device=device))
        for shape in {before.shape for before, _ in pairs}
    }
    read = sum(2 * before.nbytes for before, _ in pairs)
    times = round(4 * PARAMETERS / read)

    def work() -> None:
        for _ in range(times):
            for before, after in pairs:
                row_products(
                    lambda start, stop, w=before: w[start:stop],  # type: ignore[misc]
                    lambda start, stop, w=after: w[start:stop],  # type: ignore[misc]
                    *factors[before.shape], bfloat16=True, device=device,
                )  # fmt: skip

    return times * read / seconds(work, device)


def main() -> int:
    """Measure, print and write the table; 2 where there is no GPU."""
    if not cuda_devices():
        print(f"nothing was measured: {no_device()}", file=sys.stderr)
        return 2
    from benchmarks.image_sweep import main as sweep

    text = ""
    options = ["--device", "cuda", "--dtype", "bfloat16"]
    for part in (lambda: measured("cuda"), lambda: of_files("cuda"), lambda: sweep(options)):
        shown = "\n".join([*part(), ""])
        print(shown, flush=True)
        text += shown
        REPORT.write_text(text, encoding="utf-8")
    return 0


def of_files(device: str) -> list[str]:
    """Verify all rows of files that the system keeps in memory, on the processor and on the device in turns."""
    from harness.doctor import verify_merge

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read = merged_files(folder, device)
        least = dict.fromkeys(("cpu", device), float("inf"))
        for _ in range(2):
            for where in least:
                began = time.perf_counter()
                report = verify_merge(*(folder / f"{part}.safetensors" for part in PARTS), full=True, device=where)
                least[where] = min(least[where], time.perf_counter() - began)
                assert report.overall.outcome == "passed", report.overall.text()
    rows = [[where, f"{took:.1f}", f"{read / took / GIGA:.2f}"] for where, took in least.items()]
    head = ["`verify --full --device`", f"{read / GIGA:.1f} GB of files, s", "GB/s"]
    return ["## Of files", "", *table(head, rows)]


def merged_files(folder: Path, device: str) -> int:
    """Write a base, its merge at scale 1 and the LoRA, of rank 32, all in bfloat16; return the bytes of both."""
    import torch
    from safetensors.torch import save_file

    from harness.files import LoraWeights, write_lora

    base, merged, lora = {}, {}, {}
    for number in range(OF_FILES * len(SHAPES)):
        rows, columns = SHAPES[number % len(SHAPES)]
        name, made = f"blocks.{number}.up", partial(torch.randn, device=device, dtype=torch.bfloat16)
        weight, a, b = 0.02 * made(rows, columns), made(32, columns), made(rows, 32)
        base[f"{name}.weight"] = weight.cpu()
        merged[f"{name}.weight"] = (weight + 1e-3 * (b @ a)).cpu()
        lora[name] = LoraWeights(a.cpu(), (1e-3 * b).cpu(), 32.0)
    for part, tensors in (("base", base), ("merged", merged)):
        save_file(tensors, folder / f"{part}.safetensors")
    write_lora(folder / "lora", "diffsynth", lora)
    return 2 * sum(weight.nbytes for weight in base.values())


def measured(device: str) -> list[str]:
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
    where = f"{machine}; base, merged and LoRA lie in its memory, the weights in bfloat16."
    return ["# Full verify on a GPU", "", where, "", *table(head, rows), LIMIT, ""]


if __name__ == "__main__":
    sys.exit(main())
