"""What the benchmarks share: a stopwatch, tables, aims, and LoRA files drawn at random."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import resource
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REPEATS = 3
GIGA = 1e9
_PARTS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "attn.add_q_proj",
    "attn.add_k_proj",
)  # fmt: skip
_CODES = {"F32": "f", "F16": "e"}


def best(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the least processor time of `work` in seconds: what others do on this machine does not count."""
    return best_of({"": work}, repeats)[""]


def best_of(works: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Return the least processor time of each, all taking turns."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            began = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - began)
    return least


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table and an empty line."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def judged(value: str, *, met: bool) -> str:
    """Return a measured value with whether its aim is met."""
    return f"{value} ({'met' if met else '**missed**'})"


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known = dict(line.split(":", 1) for line in lines if ":" in line)
        name = known.get("model name\t", "").strip()
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def one_thread() -> dict[str, str]:
    """Return the environment in which torch and numpy start with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def peak_megabytes() -> float:
    """Return the most memory this process had; what the system keeps for `getrusage` counts its parent's too."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def library(folder: Path, files: int, seed: int, *, weights: bool = True) -> Path:
    """Write LoRA files with tiny weights: format, blocks, parts, rank, dtype and metadata are drawn at random.

    Without `weights` a file ends behind its alphas and is a hole from there on, which takes no room.
    """
    draw = random.Random(seed)
    for number in range(files):
        place = folder / f"{number // 500:02d}" / f"{number:05d}.safetensors"
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as stream:
            written, size = _drawn_file(draw, weights=weights)
            stream.write(written)
            stream.truncate(size)
    return folder


def _drawn_file(draw: random.Random, *, weights: bool) -> tuple[bytes, int]:
    """Return the bytes of a file and its size, which is more when the weights are left out."""
    kohya, dtype, rank = draw.random() < 0.5, draw.choice(("F16", "F32")), draw.choice((4, 8, 16, 32))
    width, high = draw.choice((16, 32)), draw.choice((16, 48))
    header: dict[str, object] = {"__metadata__": _metadata(draw, rank, kohya)}
    tensors: list[tuple[str, list[int]]] = []
    for block in range(draw.randint(8, 40)):
        for part in draw.sample(_PARTS, draw.randint(2, 4)):
            tensors += _tensors(f"transformer_blocks.{block}.{part}", kohya, rank, width, high)
    chunks: list[bytes] = []
    at, width_of = 0, struct.calcsize(_CODES[dtype])
    for name, shape in sorted(tensors, key=lambda tensor: bool(tensor[1])) if not weights else tensors:
        size = width_of * math.prod(shape)
        if not shape:
            chunks.append(struct.pack(f"<{_CODES[dtype]}", rank))
        elif weights:
            chunks.append(draw.randbytes(size // (width_of // 2)) * (width_of // 2))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(chunks), 8 + len(text) + at


def _tensors(name: str, kohya: bool, rank: int, width: int, high: int) -> list[tuple[str, list[int]]]:
    stem = f"lora_unet_{name.replace('.', '_')}" if kohya else f"transformer.{name}"
    halves = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    alpha: list[tuple[str, list[int]]] = [(f"{stem}.alpha", [])] if kohya else []
    return [*alpha, (f"{stem}.{halves[0]}.weight", [rank, width]), (f"{stem}.{halves[1]}.weight", [high, rank])]


def _metadata(draw: random.Random, rank: int, kohya: bool) -> dict[str, str]:
    if not kohya:
        config = {"transformer.r": rank, "transformer.lora_alpha": 2 * rank}
        return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    names = ("ss_network_module", "ss_output_name", "ss_learning_rate", "ss_num_epochs", "modelspec.title")
    chosen = {name: f"value {draw.random()}" for name in draw.sample(names, 3)}
    return {"ss_network_dim": str(rank), "ss_network_alpha": str(rank), **chosen}
