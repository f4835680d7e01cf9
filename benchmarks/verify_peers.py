"""`verify` beside deltalint on the same merges: those of this repository's tests, whose true answer is known.

    python -m benchmarks.verify_peers --deltalint PYTHON

Prints the table of docs/peers.md. Every merge is made by PEFT; `right` says how many of a group got the true answer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tools import table
from harness.doctor import verify_merge
from harness.errors import UserError
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


def ours(paths: Paths) -> int:
    base, merged, adapter = paths
    try:
        return verify_merge(base, merged, adapter, full=True).exit_code
    except UserError:
        return 2


_LOOP = """
import contextlib, io, sys
from deltalint.cli import main
for line in sys.stdin:
    base, merged, adapter = line.split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(["check", "--base", base, "--merged", merged, "--adapter", adapter, "--quiet"])
        except SystemExit as end:
            code = end.code
        except Exception:
            code = 2
    print(code, flush=True)
"""


def deltalint(python: str, paths: Sequence[Paths]) -> list[int]:
    """Return its exit codes, all from one process."""
    lines = "\n".join(" ".join(map(str, one)) for one in paths)
    done = subprocess.run([python, "-c", _LOOP], input=lines, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deltalint", required=True, help="a Python in which deltalint is installed")
    python = parser.parse_args(argv).deltalint
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = list(merges())
        folders = [Path(name) / str(number) for number in range(len(wanted))]
        for folder in folders:
            folder.mkdir()
        paths = [merge.make(folder) for merge, folder in zip(wanted, folders, strict=True)]
        answers = list(map(ours, paths)), deltalint(python, paths)
    counts: dict[str, list[int]] = {}
    for merge, *codes in zip(wanted, *answers, strict=True):
        row = counts.setdefault(merge.group, [0] * 7)
        row[0] += 1
        for place, code in zip((1, 4), codes, strict=True):
            row[place] += code == (0 if merge.right else 1)
            row[place + 1] += code in (2, 3)
            row[place + 2] += code == (1 if merge.right else 0)
    head = ["merges", "", "ours: right", "not judged", "false", "deltalint: right", "not judged", "false"]
    print("\n".join(table(head, [[group, *map(str, row)] for group, row in counts.items()])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
