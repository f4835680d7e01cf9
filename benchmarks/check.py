"""How long a check takes: its imports, the first sure answer of a wrong loader, the whole check of a right one."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools import judged, one_thread, table

ROOT = Path(__file__).parents[1]
MOST_TO_ANSWER, MOST_WHOLE = 3.0, 30.0
CORES = 2
IMPORTS = {
    "torch": "import torch",
    "and the checks": "import harness.checks.run",
    "and diffusers' Qwen-Image (it imports transformers and PEFT)": "import harness.checks.run, "
    "diffusers.models.transformers.transformer_qwenimage",
    "torch and transformers' Llama": "import torch, transformers.models.llama.modeling_llama",
    "torch and PEFT (it imports transformers)": "import torch, peft",
}
RIGHT = """from pathlib import Path
import torch
from harness.files import match_modules, read_lora

@torch.no_grad()
def load(model, lora: Path, *, strength: float = 1.0) -> None:
    adapter, layers = read_lora(lora), dict(model.named_modules())
    names, left = match_modules(adapter, layers)
    if left or adapter.unused_keys or any(m.keys.keys() - {"A", "B", "alpha"} for m in adapter.modules.values()):
        raise NotImplementedError("only A and B of layers that the model has are supported")
    for name, layer in names.items():
        a, b = (half.double() for half in adapter.tensors(name))
        weight = layers[layer].weight
        weight.copy_((weight.double() + strength * adapter.modules[name].trained_scale * (b @ a)).to(weight.dtype))
"""


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock and of processors, and what was printed."""

    wall: float
    processor: float
    said: str


def spent(*words: str) -> Spent:
    """Run Python with `words`; what fails on purpose is no error."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=one_thread(), capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout)


def imports() -> list[str]:
    rows = []
    for what, code in IMPORTS.items():
        found = min((spent("-c", code) for _ in range(2)), key=lambda each: each.processor)
        rows.append([what, f"{found.processor:.1f}", f"{found.wall:.1f}"])
    return table(["import", "processor, s", "clock, s"], rows)


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    few = ["--max-examples", "2"] if "--quick" in argv else []
    ready = spent("-c", IMPORTS["and diffusers' Qwen-Image (it imports transformers and PEFT)"]).processor
    wrong = spent("-m", "harness", "check", "examples/raw_alpha.py:load", "-x", "-j", "1", "--bench", "qwen-image")
    told = re.search(r"sure +after (\d+) files, ([\d.]+) s", wrong.said)
    with tempfile.TemporaryDirectory() as folder:
        right = Path(folder) / "right.py"
        right.write_text(RIGHT, encoding="utf-8")
        whole = spent("-m", "harness", "check", f"{right}:load", "-j", str(CORES), *few)
    after, share = wrong.processor - ready, whole.processor / CORES
    said = f"clock {told[2]} s after imports, {told[1]} files" if told else "**no early answer**"
    first, full = (
        judged(f"{each:.1f}", met=each <= most) for each, most in ((after, MOST_TO_ANSWER), (share, MOST_WHOLE))
    )
    rows = [
        ["a loader wrong everywhere, to its first sure answer (-x)", first, said],
        [f"a right one, all default cells, of {CORES} cores each", full, f"clock {whole.wall:.0f} s"],
    ]
    aims = f"Aims: {MOST_TO_ANSWER:g} s after imports to the first sure answer, {MOST_WHOLE:g} s for the whole check. "
    aims += "Processor seconds; the first has PEFT's own merge for the reference in it, and the ends of all processes."
    head = ["check", "processor, s", ""]
    return ["## What a check costs", "", aims, "", *imports(), *table(head, rows)]
