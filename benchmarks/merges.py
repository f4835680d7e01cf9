"""`verify`: a whole layer against a product over the same bytes, sampled layers, accuracy, and a 40 GB checkpoint.

    python -m benchmarks.merges [--quick | --large]

The rival of a full verify is what this processor does best: the product in bfloat16, or chunks converted to float32
and then multiplied. Ratios are of processor time in one run on one thread.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.tools import GIGA, best, best_of, judged, peak_megabytes, table
from harness.doctor import verify_merge
from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.changes import changes
from harness.doctor.verify.changes import merged_layer as layer_of
from harness.doctor.verify.layer import MergedLayer
from harness.doctor.verify.measuring import measure
from harness.doctor.verify.products import LowRank
from harness.doctor.verify.row_products import bfloat16_is_quicker
from harness.doctor.verify.rows import Rounding
from harness.doctor.verify.weights import Weights
from harness.files import LoraWeights, read_lora, write_lora

ROOT = Path(__file__).parents[1]
LEAST_DENSE, LEAST_SHARE, MOST_SAMPLED = 10, 0.6, 5e-3
MOST_SECONDS, MOST_MEGABYTES = 60, 1024
ACCURACY = {1e-2: 0.002, 1e-3: 0.002, 1e-4: 0.02}  # ||ΔW|| / ||W|| -> largest relative error of the scale
CHUNK_BYTES = 1 << 20


def merged_layer(folder: Path, shape: tuple[int, int], rank: int, ratio: float) -> MergedLayer:
    """Write a bf16 base, its merge at scale 0.5 and the LoRA; `ratio` is ||ΔW|| / ||W||."""
    out, inputs = shape
    base = (torch.randn(out, inputs) * 0.02).bfloat16()
    a, b = torch.randn(rank, inputs), torch.randn(out, rank)
    size = 0.5 * (out * inputs * rank) ** 0.5
    b *= ratio * 0.02 * (out * inputs) ** 0.5 / size
    parts = zip(base.split(1024), b.split(1024), strict=True)
    save_file({"x.weight": base}, folder / "base.safetensors")
    save_file(
        {"x.weight": torch.cat([(w + 0.5 * (part @ a)).bfloat16() for w, part in parts])}, folder / "merged.safetensors"
    )
    lora = write_lora(folder / "lora", "diffsynth", {"x": LoraWeights(a.bfloat16(), b.bfloat16(), 0.5 * rank)})
    stores = [Weights.of(Checkpoint.open(folder / f"{name}.safetensors")) for name in ("base", "merged")]
    adapter = read_lora(lora)
    layer = layer_of(adapter, next(changes(adapter, "x", "x.weight")), *stores)
    assert layer is not None
    return layer


def halves(layer: MergedLayer) -> LowRank:
    assert isinstance(layer.product, LowRank)
    return layer.product


def drawn(quick: bool) -> list[tuple[tuple[int, int], int]]:
    """Return layers (shape, rank): two of Qwen-Image, and some whose shape and rank are drawn at random."""
    draw = random.Random(0)
    some = [((draw.randrange(1024, 8192), draw.randrange(1024, 4096)), draw.randrange(16, 129)) for _ in range(3)]
    fixed = [((3072, 3072), 16), ((3072, 3072), 64), ((3072, 3072), 128), ((12288, 3072), 16), ((12288, 3072), 64)]
    return [*fixed[1:2], *some[:1]] if quick else [*fixed, *some]


def verification(quick: bool) -> list[str]:
    head = ["layer, bf16", "rank", "full, GB/s", "dense way /", "of the rival's speed", "rival", "sampled, ms"]
    return table(head, [verify_row(*layer) for layer in drawn(quick)])


def verify_row(shape: tuple[int, int], rank: int) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        layer = merged_layer(Path(name), shape, rank, 1e-2)
        rounding = Rounding.of(layer.sample(16_000), 0.5)
        ways = {"ours": lambda: layer.stream(rounding), "float32": lambda: products(layer, torch.float32)}
        if bfloat16_is_quicker():
            ways["bfloat16"] = lambda: products(layer, torch.bfloat16)
        seconds = best_of(ways, 5)
        sampled = best(lambda: measure(layer, 0.5), 9)
        dense = best(lambda: projection(layer), 2) / seconds["ours"]
    full = seconds.pop("ours")
    rival = min(seconds, key=lambda name: seconds[name])
    share = seconds[rival] / full
    return [
        f"{shape[0]} x {shape[1]}", str(rank), f"{4 * shape[0] * shape[1] / full / GIGA:.1f}",
        judged(f"{dense:.0f}", met=dense >= LEAST_DENSE), judged(f"{share:.0%}", met=share >= LEAST_SHARE), rival,
        judged(f"{1e3 * sampled:.1f}", met=sampled <= MOST_SAMPLED),
    ]  # fmt: skip


def products(layer: MergedLayer, dtype: torch.dtype) -> None:
    """Multiply every row of both checkpoints with A^T, in chunks that fit the cache."""
    right = halves(layer).right.to(dtype).t().contiguous()
    step = max(1, CHUNK_BYTES // (2 * layer.columns))
    for store in (layer.base, layer.merged):
        for start in range(0, layer.rows, step):
            store.rows(layer.tensor, start, min(start + step, layer.rows)).to(dtype) @ right


def projection(layer: MergedLayer) -> float:
    before, after = (store.rows(layer.tensor, 0, layer.rows).float() for store in (layer.base, layer.merged))
    product = halves(layer).left.float() @ halves(layer).right.float()
    return float(((after - before) * product).sum() / product.square().sum())


def accuracy() -> list[str]:
    rows = []
    for ratio, most in ACCURACY.items():
        with tempfile.TemporaryDirectory() as name:
            layer = merged_layer(Path(name), (3072, 3072), 32, ratio)
            found, plain = measure(layer, 0.5), projection(layer)
        error = abs(found.scale / 0.5 - 1)
        low, high = (end / 0.5 for end in found.interval)
        shown = judged(f"{found.scale / 0.5:.4f} ± {most:g}", met=error <= most)
        rows.append([f"{ratio:.0e}", shown, f"{low:.4f} to {high:.4f}", f"{plain / 0.5:.3f}"])
    return table(["update / weight", "found / true scale", "interval", "plain projection"], rows)


def large(folder: Path, shards: int = 10, layers: int = 53) -> list[str]:
    """Verify a sparse checkpoint of the 40 GB class: 530 layers of 12288 x 3072 in bf16, ten shards."""
    names = [f"blocks.{number}.up" for number in range(shards * layers)]
    for kind in ("base", "merged"):
        (folder / kind).mkdir()
        index = {}
        for shard in range(shards):
            keys = [f"{name}.weight" for name in names[shard * layers : (shard + 1) * layers]]
            index |= dict.fromkeys(keys, f"model-{shard}.safetensors")
            sparse(folder / kind / f"model-{shard}.safetensors", keys, (12288, 3072))
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    pair = LoraWeights(torch.randn(4, 3072).bfloat16(), torch.randn(12288, 4).bfloat16(), 2.0)
    lora = write_lora(folder / "lora", "diffsynth", dict.fromkeys(names, pair))
    began = time.perf_counter()
    verify_merge(folder / "base", folder / "merged", lora)
    seconds = time.perf_counter() - began
    peak = peak_megabytes()
    size = f"{len(names) * 12288 * 3072 * 2 / GIGA:.0f} and the same"
    row = [size, str(len(names)), judged(f"{seconds:.1f}", met=seconds <= MOST_SECONDS)]
    memory = judged(f"{peak:.0f}", met=peak <= MOST_MEGABYTES)
    return table(["checkpoint, sparse, GB", "layers", "sampled, wall s", "peak memory, MB"], [[*row, memory]])


def sparse(path: Path, keys: Sequence[str], shape: tuple[int, int]) -> None:
    size = 2 * shape[0] * shape[1]
    rows = {
        k: {"dtype": "BF16", "shape": shape, "data_offsets": [n * size, (n + 1) * size]} for n, k in enumerate(keys)
    }
    head = json.dumps(rows).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        stream.truncate(8 + len(head) + size * len(keys))


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "--large" in argv:
        with tempfile.TemporaryDirectory() as name:
            return large(Path(name))
    aims = (
        f"full: {LEAST_DENSE} times quicker than the dense way, {LEAST_SHARE:.0%} of the speed of a product of rank r "
        "over the same bytes (the quicker of bfloat16 and float32); "
        f"sampled: {1e3 * MOST_SAMPLED:g} ms a layer; a checkpoint of 40 GB in {MOST_SECONDS} s and {MOST_MEGABYTES} MB"
    )
    has = "has" if bfloat16_is_quicker() else "has no"
    note = (
        f"This processor {has} instructions for bfloat16; without them full verify and the dense way both spend their"
    )
    note += " time in float32 products of the same size, which bounds that ratio at high rank."
    lines = ["## Verify", "", f"Aims: {aims}. {note}", "", *verification("--quick" in argv), *accuracy()]
    if "--quick" not in argv:  # in a process of its own, for its peak memory
        done = [sys.executable, "-m", "benchmarks.merges", "--large"]
        lines += subprocess.run(done, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
