"""Headers and a whole library: how many LoRA files a second are read, inspected and audited.

The rival is safetensors' own `safe_open` with the shape of every tensor, in the same run on the same files.
"""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from benchmarks.tools import best_of, judged, library, table
from harness.doctor import inspect_file
from harness.files import read_header, read_lora

ROOT = Path(__file__).parents[1]
FILES, QUICK = 2000, 400
HEADERS = 100
WORKERS = 2
LEAST_HEADERS = 1000  # a second
MOST_SECONDS = 15.0  # for AIMED files on two cores
AIMED = 10_000


def headers(folder: Path) -> list[str]:
    """Compare what reads a header with safetensors itself."""
    files = sorted(folder.rglob("*.safetensors"))[:HEADERS]
    gc.collect()
    gc.freeze()
    seconds = best_of(
        {
            "`safe_open` and every shape": lambda: [opened(file) for file in files],
            "`read_header`: validated, every tensor's dtype, shape and place": lambda: [read_header(f) for f in files],
            "`read_lora`: modules, ranks and alphas": lambda: [read_lora(file) for file in files],
            "`inspect_file`: hazards and prescriptions too": lambda: [inspect_file(file) for file in files],
        },
        5,
    )
    gc.unfreeze()
    rival = next(iter(seconds.values()))
    rows = []
    for number, (name, taken) in enumerate(seconds.items()):
        speed = f"{len(files) / taken:,.0f}"
        shown = judged(speed, met=len(files) / taken >= LEAST_HEADERS) if number == 1 else speed
        rows.append([name, shown, f"{taken / rival:.1f}"])
    return table(["headers, serial", "files/s", "times the time of `safe_open`"], rows)


def opened(file: Path) -> list[object]:
    with safe_open(str(file), "np") as stream:
        return [stream.get_slice(key).get_shape() for key in stream.keys()]  # noqa: SIM118  # no mapping


def audit(folder: Path, files: int) -> list[str]:
    """Audit the folder as a user does, with duplicates and a file of rows."""
    out = folder / "rows.jsonl"
    command = [sys.executable, "-m", "harness", "audit", str(folder), "-j", str(WORKERS), "--out", str(out)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    each = f"{1e3 * processor / files:.1f}"
    aimed = processor / WORKERS * AIMED / files
    head = ["audit", "wall, s", "processor, s", "processor per file, ms", f"per core for {AIMED:,} files, s"]
    row = [
        f"{files:,} files",
        f"{wall:.1f}",
        f"{processor:.1f}",
        each,
        judged(f"{aimed:.1f}", met=aimed <= MOST_SECONDS),
    ]
    return table(head, [row])


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    files = QUICK if "--quick" in argv else FILES
    with tempfile.TemporaryDirectory() as name:
        folder = library(Path(name), files, seed=0)
        lines = [*headers(folder), *audit(folder, files)]
    aims = f"at least {LEAST_HEADERS:,} headers a second; {AIMED:,} files in at most {MOST_SECONDS:.0f} s on two cores"
    return ["## Headers and libraries", "", f"Aims: {aims}. Files of about 200 tensors.", "", *lines]


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
