"""Run benchmarks and write benchmarks/results.md: `python -m benchmarks [--quick] [NAME...]`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.tools import best, one_thread, processor

HERE = Path(__file__).parent
# Every module has `main(argv) -> list[str]`: the lines of one or more Markdown sections.
NAMES = (
    "startup",
    "check",
    "library",
    "energies",
    "merges",
    "peers",
    "share",
    "cells",
    "serve",
    "image_sweep",
    "report",
)
LOOP = 1_000_000
FAILED = "**`python -m benchmarks {}` failed**: nothing of it is here."
READ_ME = (
    "Ratios are taken within one run, the ways taking turns, on one thread. Where a limit is a time, processor time is "
    "judged, which is the wall time of an idle processor: others used this one meanwhile. Written by `make bench`."
)


def machine() -> str:
    import torch

    where = f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {platform.system()}"
    return f"{date.today()}, {where}, Python {platform.python_version()}, torch {torch.__version__}"


def section(name: str, argv: Sequence[str]) -> list[str]:
    """Run one benchmark in a process of its own: memory that another has used is quicker to have again.

    One that fails is a section that says so: what the others have measured is kept.
    """
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    began = time.perf_counter()
    code = f"from benchmarks.{name} import main; print(chr(10).join(main({list(argv)!r})))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=HERE.parent, env=one_thread(), stdout=subprocess.PIPE, text=True, check=False)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if run.returncode:
        return [FAILED.format(name), ""]
    return [*run.stdout.rstrip().splitlines(), ""]


def pace() -> float:
    """Return the seconds that a loop of Python's own takes now: neighbours on the same processor slow it down."""
    return best(lambda: sum(number & 1 for number in range(LOOP)), 5)


def steadiness(paces: Sequence[float]) -> str:
    """Say how steady the machine was between the parts."""
    fast, slow = min(paces), max(paces)
    return (
        f"Between the parts a loop of a million steps in Python took {1e3 * fast:.0f} to {1e3 * slow:.0f} ms of "
        f"processor, {slow / fast:.1f} times as long at worst: seconds are no surer than that."
    )


def main() -> None:
    options = [argument for argument in sys.argv[1:] if argument == "--quick"]
    chosen = tuple(argument for argument in sys.argv[1:] if argument not in options) or NAMES
    unknown = set(chosen) - set(NAMES)
    if unknown:
        raise SystemExit(f"no such benchmark: {', '.join(sorted(unknown))}; known are --quick, {', '.join(NAMES)}")
    paces, sections = [pace()], list[str]()
    for name in chosen:
        sections += section(name, options)
        paces.append(pace())
    head = ["# Benchmarks", "", f"Measured on {machine()}.", "", READ_ME, "", steadiness(paces), ""]
    text = "\n".join([*head, *sections])
    print(text)
    if chosen == NAMES and not options:
        (HERE / "results.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    if failed := [name for name in chosen if FAILED.format(name) in sections]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
