"""`verify` beside deltalint on the same merges: those of this repository's tests, whose true answer is known.

    python -m benchmarks.verify_peers --deltalint PATH

Prints the table of docs/peers.md. Every merge is made by PEFT; `right` says how many of a group got the true answer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tools import table
from harness.files import LoraWeights, write_lora
from tests.doctor import damage
from tests.doctor.peft_merges import METHODS, llama, lora, lost, scaled, write
from tests.doctor.test_verify_whole_models import CONVERSIONS, FUSED, RIGHT, WRONG, rewrite

Paths = tuple[Path, Path, Path]  # base, merged, lora


@dataclass(frozen=True)
class Merge:
    """A merge whose answer is known; `make` writes it."""

    group: str
    right: bool
    make: Callable[[Path], Paths]


def merges() -> Iterator[Merge]:
    """Yield every merge, in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        for model, config in RIGHT.values():
            yield Merge(
                "heads, embeddings, biases, tokens: right", True,
                lambda d, m=model, c=config, t=dtype: write(d, llama(**m), lora(**c), dtype=t),  # type: ignore[arg-type, misc]
            )  # fmt: skip
        for model, config, change, _ in WRONG.values():
            yield Merge(
                "the same and plain LoRA: wrong", False,
                lambda d, m=model, c=config, e=change, t=dtype: write(d, llama(**m), lora(**c), dtype=t, change=e),  # type: ignore[arg-type, misc]
            )  # fmt: skip
        for kind, config_of in METHODS.items():
            layer = {"ia3": "mlp.down_proj", "ln_tuning": "input_layernorm"}.get(kind, "self_attn.q_proj")
            for change in (None, lost(f"layers.1.{layer}"), scaled(layer, 2)):
                yield Merge(
                    f"other methods: {'wrong' if change else 'right'}", change is None,
                    lambda d, c=config_of, e=change, t=dtype: write(d, llama(), c(), dtype=t, change=e),  # type: ignore[misc]
                )  # fmt: skip
        for before, after in CONVERSIONS.values():
            yield Merge("conversions: right", True, lambda d, b=before, a=after, t=dtype: converted(d, b, a, t))  # type: ignore[misc]
    for kind in damage.KINDS:
        for count in damage.COUNTS:
            yield Merge("1 to 256 damaged rows", False, lambda d, k=kind, n=count: damaged(d, k, n))  # type: ignore[misc]


def converted(folder: Path, before: object, after: object, dtype: torch.dtype) -> Paths:
    """Write a merge that was stored under other names, fused, or in another dtype."""
    base, merged, adapter = write(folder, llama(), lora(**FUSED), dtype=dtype, size=0.1)
    rewrite(merged, after)  # type: ignore[arg-type]
    if before:
        rewrite(base, before)  # type: ignore[arg-type]
    return base, merged, adapter


def damaged(folder: Path, kind: str, count: int) -> Paths:
    """Write one bf16 layer of 4096 x 1024 in which some rows are damaged."""
    base, update = damage.write_base(folder, 3e-2)
    merged = damage.write_merged(folder, base, update, kind, count)
    for name, path in (("base", folder / "base.safetensors"), ("merged", merged)):
        (folder / name).mkdir()
        path.rename(folder / name / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    torch.randn(damage.ROWS, damage.COLUMNS, generator=draw)
    a = torch.randn(damage.RANK, damage.COLUMNS, generator=draw)
    b = torch.linalg.lstsq(a.t().double(), update.t().double()).solution.t().float() * damage.RANK / damage.ALPHA
    pair = {"x": LoraWeights(a, b.contiguous(), damage.ALPHA)}
    return folder / "base", folder / "merged", write_lora(folder / "peft", "peft", pair)


def ours(paths: Paths) -> list[str]:
    base, merged, adapter = map(str, paths)
    options = ["--base", base, "--merged", merged, "--lora", adapter, "--full"]
    return [sys.executable, "-m", "harness", "verify", *options]


def deltalint(program: str, paths: Paths) -> list[str]:
    base, merged, adapter = map(str, paths)
    return [program, "check", "--base", base, "--merged", merged, "--adapter", adapter, "--quiet"]


def answer(command: Sequence[str]) -> tuple[int, float]:
    """Return the exit code and the processor seconds."""
    before, began = os.times(), time.perf_counter()
    code = subprocess.run(command, capture_output=True, check=False, timeout=600).returncode
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return code, used or time.perf_counter() - began


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deltalint", required=True)
    program = parser.parse_args(argv).deltalint
    counts: dict[str, list[float]] = {}
    for merge in merges():
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paths = merge.make(Path(name))
            row = counts.setdefault(merge.group, [0.0] * 9)
            row[0] += 1
            for place, command in ((1, ours(paths)), (5, deltalint(program, paths))):
                code, seconds = answer(command)
                row[place] += code == (0 if merge.right else 1)
                row[place + 1] += code in (2, 3)
                row[place + 2] += code == (1 if merge.right else 0)
                row[place + 3] += seconds
    head = ["merges", "", "ours: right", "not judged", "false", "deltalint: right", "not judged", "false"]
    body = [[group, *(f"{row[at]:.0f}" for at in (0, 1, 2, 3, 5, 6, 7))] for group, row in counts.items()]
    print("\n".join(table(head, body)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
