"""`python -m tests.fuzz.run`: mutate, read, and keep whatever crashes, hangs or eats memory.

`--write` puts the table into benchmarks/fuzz.md, where the rows of targets that were not run stay. A failure prints the
command that repeats it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.targets import ROOT, TARGETS, Target

SECONDS, MIB = 2.0, 500
_MEMORY = Path("/dev/shm")  # a disk would take most of the time
_WORDS = (
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"\\u0000",
    b"\xff",
    b"\n",
    b"::",
    b"9" * 30,
    b"[" * 50,
)


@dataclass
class Tally:
    """What became of one target."""

    name: str
    executions: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def mutated(seed: bytes, draw: random.Random) -> bytes:
    """Return a file like `seed`: bytes flipped, cut, repeated, swapped with words that parsers trip over."""
    content = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at, kind = draw.randrange(len(content) + 1), draw.randrange(6)
        near = draw.randrange(min(len(content), 600) + 1)  # headers come first
        place = draw.choice((at, near))
        if kind == 0 and place < len(content):
            content[place] = draw.randrange(256)
        elif kind == 1:
            del content[place : place + draw.choice((1, 8, 400))]
        elif kind == 2:
            content[place:place] = draw.choice(_WORDS)
        elif kind == 3:
            content[place : place + draw.randrange(12)] = draw.choice(_WORDS)
        elif kind == 4:
            other = draw.randrange(len(content) + 1)
            content[place:place] = content[other : other + draw.randrange(60)]
        else:
            del content[place:]
    return bytes(content)


def execute(target: Target, seed: int, folder: Path) -> tuple[float, str | None]:
    """Read the file of `seed`; return the seconds it took, and what went wrong."""
    draw = random.Random(seed)
    path = folder / target.name
    path.write_bytes(mutated(draw.choice(target.seeds), draw))
    start = time.monotonic()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(*target.allowed):
            target.read(path)
    except Exception:
        return time.monotonic() - start, traceback.format_exc(limit=-3)
    took = time.monotonic() - start
    return took, f"took {took:.1f} s" if took > SECONDS else None


def fuzz(name: str, seeds: Iterator[int] | range) -> Tally:
    """Execute a target once for every seed."""
    tally, target = Tally(name), TARGETS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        for seed in seeds:
            took, problem = execute(target, seed, Path(folder))
            tally.executions, tally.seconds = tally.executions + 1, tally.seconds + took
            tally.slowest = max(tally.slowest, took)
            if problem:
                tally.failures.append(
                    f"{problem}\nrepeat: python -m tests.fuzz.run --only {name!r} --seed {seed} --times 1"
                )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if grown > MIB:
        tally.failures.append(f"the process grew by {grown} MiB")
    return tally


def written(page: Path) -> dict[str, Tally]:
    """Return the targets that a page has already."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines() if page.is_file() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in TARGETS:
            executions, failures, seconds, slowest = (int(cell.replace(",", "")) for cell in cells[1:])
            found[cells[0]] = Tally(cells[0], executions, seconds, slowest / 1000, ["recorded"] * failures)
    return found


def table(tallies: list[Tally], seed: int) -> str:
    """Return the Markdown page of a run."""
    rows = [
        f"| {t.name} | {t.executions:,} | {len(t.failures)} | {t.seconds:,.0f} | {1000 * t.slowest:,.0f} |"
        for t in tallies
    ]
    total = f"| **all** | {sum(t.executions for t in tallies):,} | {sum(len(t.failures) for t in tallies)} | | |"
    return (
        "# Fuzzing\n\n`make fuzz` mutates the committed files and reads them. A failure is any exception but the "
        f"sentence\nthat is meant for users, more than {SECONDS:g} s, or more than {MIB} MiB. Seed {seed}.\n\n"
        "| target | executions | failures | seconds | slowest, ms |\n| --- | ---: | ---: | ---: | ---: |\n"
        + "\n".join([*rows, total])
        + "\n"
    )


def main() -> int:
    """Fuzz every target, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=100_000, help="executions of each target")
    parser.add_argument("--write", action="store_true", help="write benchmarks/fuzz.md")
    options = parser.parse_args()
    tallies = []
    for name in [options.only] if options.only else TARGETS:
        tallies.append(fuzz(name, range(options.seed, options.seed + options.times)))
        print(f"{name}: {tallies[-1].executions:,} executions, {len(tallies[-1].failures)} failures", flush=True)
        print("\n".join(tallies[-1].failures[:5]), end="")
    if options.write:
        page = ROOT / "benchmarks" / "fuzz.md"
        every = written(page) | {tally.name: tally for tally in tallies}
        page.write_text(table([every[name] for name in TARGETS if name in every], options.seed), encoding="utf-8")
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
