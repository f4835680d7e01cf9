"""Run benchmarks and write benchmarks/results.md: `python -m benchmarks [NAME...]`."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
# Every module has `main(argv) -> list[str]`: the lines of one or more Markdown sections.
NAMES = ("startup", "share", "image_sweep", "report", "doctor")


def machine() -> str:
    import torch

    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{date.today()}, {where}, Python {platform.python_version()}, torch {torch.__version__}, 1 thread"


def main() -> None:
    chosen = tuple(sys.argv[1:]) or NAMES
    unknown = set(chosen) - set(NAMES)
    if unknown:
        raise SystemExit(f"no such benchmark: {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    lines = ["# Benchmarks", "", f"Measured on {machine()}.", ""]
    for name in chosen:
        print(f"{name} ...", file=sys.stderr)
        lines += [*importlib.import_module(f"benchmarks.{name}").main([]), ""]
    text = "\n".join(lines)
    print(text)
    if chosen == NAMES:
        (HERE / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
