"""From nothing to the right number, timed: a fresh environment, the core install, one question.

`python -m benchmarks.first_answer`.

The file is the one this project began with: DiffSynth's trainer, rank 32, no alpha; asked for the release whose field
`alpha` is the strength. Prints the seconds of each step, by the clock and of a processor: on a busy machine only the
second says something. pip takes packages from its cache where it has them.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fixtures.build_malformed import tensors_file

ROOT = Path(__file__).parents[1]
QUESTION = ("--tool", "diffsynth", "--tool-version", "2.0.4")
PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mod.1", "txt_mod.1", "img_mlp.net.2")
SIDE, RANK, BLOCKS = 256, 32, 60


def founding_file(path: Path) -> Path:
    """Write a LoRA of Qwen-Image's 60 blocks as DiffSynth's trainer names it, without alpha."""
    shapes = {"lora_A": [RANK, SIDE], "lora_B": [SIDE, RANK]}
    names = [f"transformer_blocks.{block}.{part}" for block in range(BLOCKS) for part in PARTS]
    data = bytes([0, 60]) * (RANK * SIDE)  # 1.0 in float16
    path.write_bytes(
        tensors_file(
            {f"{name}.{half}.default.weight": ("F16", shape, data) for name in names for half, shape in shapes.items()}
        )
    )
    return path


def measured(folder: Path) -> tuple[dict[str, tuple[float, float]], str]:
    """Return the seconds of every step by the clock and of a processor, and what was answered."""
    file, seconds = founding_file(folder / "my_lora.safetensors"), dict[str, tuple[float, float]]()
    tools = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin")

    def step(name: str, *words: str | Path) -> str:
        began, used = time.perf_counter(), _used()
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
        seconds[name] = time.perf_counter() - began, _used() - used
        return done.stdout

    step("python -m venv", sys.executable, "-m", "venv", folder / "env")
    step("pip install", tools / "pip", "install", "--quiet", "--disable-pip-version-check", ROOT)
    return seconds, step("diagnose", tools / "lora-harness", "diagnose", file, *QUESTION)


def _used() -> float:
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the steps, their sum and the answer; 1 when the number is not the right one."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, answer = measured(Path(folder))
    together = tuple(map(sum, zip(*seconds.values(), strict=True)))
    print(f"{'':<16} {'clock':>8} {'processor':>11}")
    for name, (clock, used) in {**seconds, "together": together}.items():
        print(f"{name:<16} {clock:6.1f} s {used:9.1f} s")
    print(f"\n{answer}")
    return 0 if "alpha = 1" in answer else 1


if __name__ == "__main__":
    sys.exit(main())
