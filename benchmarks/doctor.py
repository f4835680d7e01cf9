"""Speed of the doctor, as ratios within one run on one thread.

    OMP_NUM_THREADS=1 python benchmarks/doctor.py [--large]

Every rival runs in the same process on the same tensors, the minimum of a few repeats counts. Shapes are drawn from
those of real models with a random seed, so that nothing is tuned to one of them. `--large` adds a sparse checkpoint of
the 40 GB class.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor import inspect_file, verify_merge
from harness.doctor.audit import audit_files
from harness.doctor.baked import measure
from harness.doctor.checkpoint import Checkpoint
from harness.doctor.energy import pair_energy
from harness.doctor.layer import Layer
from harness.files import LoraWeights, read_header, read_lora, write_lora

FAMILIES = {
    "Qwen-Image-like": ([(3072, 3072), (12288, 3072), (3072, 12288)], 32),
    "FLUX-like": ([(3072, 3072), (9216, 3072), (12288, 3072), (3072, 15360)], 64),
    "SDXL-like": ([(1280, 1280), (640, 640), (10240, 1280), (1280, 5120)], 128),
}
REPEATS = 3
GIGA = 1e9


def best(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the least wall time of `work` in seconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def energies(seed: int) -> list[str]:
    head = ["file", "rank", "MB", "norms + singular values, ms", "/ one float32 pass", "dense norm /"]
    return [*table(head, [energy_row(name, seed) for name in FAMILIES]), *svd()]


def energy_row(name: str, seed: int) -> list[str]:
    shapes, rank = FAMILIES[name]
    drawn = random.Random(seed).choices(shapes, k=6)
    pairs = [(torch.randn(rank, i).bfloat16(), torch.randn(o, rank).bfloat16()) for o, i in drawn]
    size = sum(half.numel() * 2 for pair in pairs for half in pair) / 1e6
    once = best(lambda: [half.float().abs().mean() for pair in pairs for half in pair])
    ours = best(lambda: [pair_energy(a, b, 0.5) for a, b in pairs])
    dense = best(lambda: [dense_norm(a, b) for a, b in pairs], 1)
    return [name, str(rank), f"{size:.0f}", f"{1e3 * ours:.1f}", f"{ours / once:.2f}", f"{dense / ours:.0f}"]


def dense_norm(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(b.float() @ a.float(), dtype=torch.float64))


def svd() -> list[str]:
    a, b = torch.randn(64, 1280), torch.randn(1280, 64)
    ours = best(lambda: pair_energy(a, b, 1.0))
    dense = best(lambda: torch.linalg.svdvals(b @ a), 1)
    return table(
        ["singular values of 1280 x 1280, rank 64", "dense SVD /"], [[f"{1e3 * ours:.2f} ms", f"{dense / ours:.0f}"]]
    )


def merged_layer(folder: Path, shape: tuple[int, int], rank: int, ratio: float) -> Layer:
    """Write a bf16 base, its merge at scale 0.5 and the LoRA; `ratio` is ||ΔW|| / ||W||."""
    out, inputs = shape
    base = (torch.randn(out, inputs) * 0.02).bfloat16()
    a, b = torch.randn(rank, inputs), torch.randn(out, rank)
    size = 0.5 * (out * inputs * rank) ** 0.5
    b *= ratio * 0.02 * (out * inputs) ** 0.5 / size
    merged = torch.cat(
        [(w + 0.5 * (part @ a)).bfloat16() for w, part in zip(base.split(1024), b.split(1024), strict=True)]
    )
    save_file({"x.weight": base}, folder / "base.safetensors")
    save_file({"x.weight": merged}, folder / "merged.safetensors")
    lora = write_lora(folder / "lora", "diffsynth", {"x": LoraWeights(a.bfloat16(), b.bfloat16(), 0.5 * rank)})
    stores = Checkpoint.open(folder / "base.safetensors"), Checkpoint.open(folder / "merged.safetensors")
    layer = Layer.of(read_lora(lora), "x", "x.weight", *stores)
    assert layer is not None
    return layer


def verification() -> list[str]:
    layers = (((3072, 3072), 16), ((3072, 3072), 64), ((3072, 3072), 128), ((12288, 3072), 16), ((12288, 3072), 64))
    head = ["layer, bf16", "rank", "full, GB/s", "dense way /", "of a bf16 product over the same bytes", "sampled, ms"]
    return table(head, [verify_row(*layer) for layer in layers])


def verify_row(shape: tuple[int, int], rank: int) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        layer = merged_layer(Path(name), shape, rank, 1e-2)
        full = best(layer.stream, 5)
        sampled = best(lambda: measure(layer, 0.5), 9)
        product = best(lambda: products(layer), 5)
        dense = best(lambda: projection(layer), 1)
    speed = 4 * shape[0] * shape[1] / full / GIGA
    ratios = [f"{speed:.1f}", f"{dense / full:.0f}", f"{product / full:.0%}", f"{1e3 * sampled:.1f}"]
    return [f"{shape[0]} x {shape[1]}", str(rank), *ratios]


def products(layer: Layer) -> None:
    right = layer.right.t().contiguous()
    for store in (layer.base, layer.merged):
        store.rows(layer.tensor, 0, layer.rows) @ right


def projection(layer: Layer) -> float:
    before, after = (store.rows(layer.tensor, 0, layer.rows).float() for store in (layer.base, layer.merged))
    product = layer.left.float() @ layer.right.float()
    return float(((after - before) * product).sum() / product.square().sum())


def accuracy() -> list[str]:
    rows = []
    for ratio in (1e-2, 1e-3, 1e-4):
        with tempfile.TemporaryDirectory() as name:
            layer = merged_layer(Path(name), (3072, 3072), 32, ratio)
            found, plain = measure(layer, 0.5), projection(layer)
            taken = best(lambda layer=layer: measure(layer, 0.5))
        low, high = (end / 0.5 for end in found.interval)
        rows.append(
            [
                f"{ratio:.0e}",
                f"{found.scale / 0.5:.4f} [{low:.4f}, {high:.4f}]",
                f"{plain / 0.5:.3f}",
                f"{1e3 * taken:.1f}",
            ]
        )
    return table(["update / weight", "found / true scale", "plain projection", "ms"], rows)


def headers(folder: Path) -> list[str]:
    tensors = {}
    for block in range(36):
        for part in ("to_q", "to_k", "to_v", "to_out_0"):
            stem = f"lora_unet_transformer_blocks_{block}_attn_{part}"
            tensors |= {f"{stem}.lora_down.weight": torch.ones(4, 8), f"{stem}.lora_up.weight": torch.ones(8, 4)}
            tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    files = [folder / f"{number}.safetensors" for number in range(60)]
    for file in files:
        save_file(tensors, file, {"ss_network_dim": "4"})
    rival = best(lambda: [opened(file) for file in files])
    works = {
        "safe_open, every shape": lambda: [opened(file) for file in files],
        "read_header": lambda: [read_header(file) for file in files],
        "read_lora": lambda: [read_lora(file) for file in files],
        "inspect_file": lambda: [inspect_file(file) for file in files],
        "audit_files, 1 child, with duplicates": lambda: audit_files([folder], workers=1),
    }
    rows = []
    for name, work in works.items():
        seconds = best(work)
        rows.append([name, f"{len(files) / seconds:.0f}", f"{rival / seconds:.2f}"])
    return table(["144 modules, 432 tensors", "files/s", "of safe_open"], rows)


def opened(file: Path) -> list[object]:
    with safe_open(str(file), "np") as stream:
        return [stream.get_slice(key).get_shape() for key in stream.keys()]  # noqa: SIM118  # no mapping


def large(folder: Path, shards: int = 10, layers: int = 53, full: bool = False) -> list[str]:
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
    verify_merge(folder / "base", folder / "merged", lora, full=full)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = [f"{len(names) * 12288 * 3072 * 2 / GIGA:.0f} + the same", str(len(names)), f"{seconds:.1f}", f"{peak:.0f}"]
    return table(["checkpoint, GB", "layers", "sampled verify, s", "peak memory of this process, MB"], [row])


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


def sections(seed: int, is_large: bool) -> Iterator[list[str]]:
    if is_large:  # first, because the peak memory is that of the whole process
        with tempfile.TemporaryDirectory() as name:
            yield ["### A checkpoint of the 40 GB class", "", *large(Path(name))]
    yield ["### Energies: ||ΔW|| and every singular value of one file", "", *energies(seed)]
    yield ["### Verify", "", *verification(), *accuracy()]
    with tempfile.TemporaryDirectory() as name:
        yield ["### Headers", "", *headers(Path(name))]


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run every benchmark and return the Markdown lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="add a sparse checkpoint of the 40 GB class")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    return [line for section in sections(options.seed, options.large) for line in section]


if __name__ == "__main__":
    print("\n".join(main()))
