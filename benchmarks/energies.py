"""||ΔW|| and every singular value of LoRA files of real size, against one pass over their bytes and what bounds them.

    python -m benchmarks.energies [--quick | --file NAME PATH]

A file has the modules of a real model in the order and shapes that trainers save them. Every file is measured in a
process of its own, for its peak memory.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.roofline import floor, products
from benchmarks.tools import best, best_of, judged, one_thread, peak_megabytes, table
from harness.doctor.inspect.energy import energies, pair_energy
from harness.files import read_lora

ROOT = Path(__file__).parents[1]
LEAST_DENSE, LEAST_SVD, MOST_MEGABYTES = 100, 1000, 100
DENSE_LAYERS = 12
_SVD = 3072
_QWEN_IMAGE = [((3072, 3072), 480), ((12288, 3072), 120), ((3072, 12288), 120)]
_FLUX = [
    ((3072, 3072), 266), ((12288, 3072), 76), ((3072, 12288), 38),
    ((3072, 15360), 38), ((18432, 3072), 38), ((9216, 3072), 38),
]  # fmt: skip
_SDXL = [
    ((1280, 1280), 372), ((1280, 2048), 120), ((10240, 1280), 60), ((1280, 5120), 60),
    ((640, 640), 70), ((640, 2048), 20), ((5120, 640), 10), ((640, 2560), 10),
]  # fmt: skip
# name -> (shape, how many), rank
FILES = {"Qwen-Image-like": (_QWEN_IMAGE, 32), "FLUX-like": (_FLUX, 64), "SDXL-like": (_SDXL, 128)}
CORES = 2
# passes over the bytes, on one thread and on CORES: up to rank 64, and above
LOW, HIGH = (1.5, 1.0), (3.5, 2.0)
DRAWN = "drawn at random"


def kind(name: str) -> tuple[list[tuple[tuple[int, int], int]], int]:
    """Return the shapes of a file, and its rank."""
    if name in FILES:
        return FILES[name]
    draw = random.Random(0)
    shapes = [(draw.randrange(512, 8192), draw.randrange(512, 8192)) for _ in range(40)]
    return [(shape, draw.randrange(2, 12)) for shape in shapes], draw.randrange(16, 65)


def write(path: Path, name: str) -> None:
    shapes, rank = kind(name)
    layers = [shape for shape, number in shapes for _ in range(number)]
    random.Random(0).shuffle(layers)
    tensors: dict[str, Tensor] = {}
    for number, (out, inputs) in enumerate(layers):
        tensors[f"diffusion_model.blocks.{number}.x.lora_A.weight"] = torch.randn(rank, inputs).bfloat16()
        tensors[f"diffusion_model.blocks.{number}.x.lora_B.weight"] = torch.randn(out, rank).bfloat16()
    save_file(tensors, path)


def one_pass(path: Path) -> None:
    """Read every tensor as float32 and average it: what the plainest statistics of a file cost."""
    with safe_open(path, framework="pt") as stream:
        for key in stream.keys():  # noqa: SIM118 - a handle is no dictionary
            stream.get_tensor(key).float().abs().mean()


def file_row(name: str, path: Path) -> list[str]:
    """Measure one file; the rows of both tables, one after the other."""
    _, rank = kind(name)
    before = peak_megabytes()
    energies(read_lora(path))
    size = path.stat().st_size / 1e6
    more = peak_megabytes() - before - size
    ways = {"pass": lambda: one_pass(path), "ours": lambda: energies(read_lora(path))}
    seconds, clock = best_of(ways, 5), {name: wall(way) for name, way in ways.items()}
    torch.set_num_threads(CORES)
    passes = seconds["ours"] / seconds["pass"], wall(ways["ours"]) / clock["pass"]
    torch.set_num_threads(1)
    aims = LOW if rank <= 64 else HIGH
    together = (os.cpu_count() or 1) >= CORES
    dense = of_some_layers(path)
    aimed = judged(f"{dense:.0f}", met=dense >= LEAST_DENSE) if name == "Qwen-Image-like" else f"{dense:.0f}"
    parts, least = floor(path)
    return [
        name, str(rank), f"{size:.0f}", f"{seconds['pass']:.2f}", f"{seconds['ours']:.2f}",
        judged(f"{passes[0]:.2f}, aim {aims[0]:g}", met=passes[0] <= aims[0]),
        judged(f"{passes[1]:.2f}, aim {aims[1]:g}", met=passes[1] <= aims[1]) if together else "one core",
        aimed, judged(f"{more:+.0f}", met=more <= MOST_MEGABYTES),
        *parts, f"{least / seconds['pass']:.2f}", f"{least / seconds['ours']:.0%}",
        _reach(least / seconds["pass"], aims[0]),
    ]  # fmt: skip


def _reach(least: float, aim: float) -> str:
    """Say whether the aim, in passes, could be met here at all."""
    return f"out of reach: {least:.2f} at best" if least > aim else "within reach"


def wall(work: Callable[[], object]) -> float:
    """Return the least seconds of the clock of five times."""
    found = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def of_some_layers(path: Path) -> float:
    """Return how much longer the norms take by way of B @ A."""
    adapter = read_lora(path)
    pairs = [adapter.tensors(name) for name in random.Random(0).sample(sorted(adapter.modules), DENSE_LAYERS)]
    ours = best(lambda: [pair_energy(a, b, 1.0) for a, b in pairs], 5)
    return best(lambda: [dense_norm(a, b) for a, b in pairs], 1) / ours


def dense_norm(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(b.float() @ a.float(), dtype=torch.float64))


def svd() -> list[str]:
    a, b = torch.randn(64, _SVD), torch.randn(_SVD, 64)
    ours = best(lambda: pair_energy(a, b, 1.0), 5)
    ratio = best(lambda: torch.linalg.svdvals(b @ a), 1) / ours
    head = [f"singular values of one {_SVD} x {_SVD} layer, rank 64", "dense SVD /"]
    return table(head, [[f"{1e3 * ours:.2f} ms", judged(f"{ratio:,.0f}", met=ratio >= LEAST_SVD)]])


def rows(names: Sequence[str]) -> Iterator[list[str]]:
    """Measure every file in its own process."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora.safetensors"
            write(path, name)
            done = [sys.executable, "-m", "benchmarks.energies", "--file", name, str(path)]
            run = subprocess.run(done, cwd=ROOT, env=one_thread(), capture_output=True, text=True, check=True)
            yield run.stdout.strip().split("\t")


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "--file" in argv:
        return ["\t".join(file_row(argv[1], Path(argv[2])))]
    names = list(FILES)[:1] if "--quick" in argv else [*FILES, DRAWN]
    found = list(rows(names))
    lines = ["## Energies: ||ΔW|| and every singular value", "", _SAID.replace("\n", " "), ""]
    lines += [*table(HEAD, [row[: len(HEAD)] for row in found]), *svd(), _BOUND.replace("\n", " "), ""]
    return [*lines, *table(BOUNDS, [[row[0], *row[len(HEAD) :]] for row in found]), *products()]


HEAD = [
    "file", "rank", "MB", "pass, s", "ours, s", "passes, one thread", f"passes, {CORES} threads, by the clock",
    "dense norm /", "MB over the file",
]  # fmt: skip
BOUNDS = [
    "file",
    "GB",
    "GFLOP",
    "bytes, s",
    "products, s",
    "LAPACK, s",
    "sum, in passes",
    "of our time",
    "aim of one thread",
]
_SAID = f"""Aims: {LOW[0]:g} passes over the bytes up to rank 64 and {HIGH[0]:g} at rank 128, on {CORES} cores
{LOW[1]:g} and {HIGH[1]:g} of the same; {LEAST_DENSE} times quicker than the dense norm on the first,
{LEAST_SVD:,} times quicker than a dense SVD, {MOST_MEGABYTES} MB more memory than the file has. Whole files in
bfloat16; the dense way on {DENSE_LAYERS} of their layers. A pass reads every tensor with safetensors, as float32, and
averages it."""
_BOUND = """What bounds them on one thread: reading and converting every byte, every product at the best speed of
a symmetric float32 product of its rank here, and LAPACK on Gram matrices that lie in the cache. Where their sum is
more passes than the aim, arithmetic is the limit, and the aim is out of reach of this way to compute on this processor.
The last table says why the products are of float32."""


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
