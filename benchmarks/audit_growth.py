"""How the cost of an audit grows with the library: seconds and memory, in children of one process and on dask.

    python -m benchmarks.audit_growth [WAY:COUNT ...]

Measures the points (`local:1000`; ways are `local`, two children, and `dask`, two workers of a cluster on this one),
keeps each in benchmarks/audit_growth.json instead of an earlier one, and draws docs/audit_growth.svg; `python -m
benchmarks.tables` writes the page. A header is real, of about 200 tensors; the weights behind it are a hole. Points of
`rows` are those of `benchmarks.audit_memory`, where a row stands for each file: what the audit itself keeps.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.tools import library, processor

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).with_suffix(".json")
PLOT = ROOT / "docs" / "audit_growth.svg"
WORKERS = 2
DEFAULT = ("local:1000", "local:10000", "local:100000", "dask:1000", "dask:10000")
TITLES = {"local": "headers, two children", "dask": "headers, two dask workers", "rows": "rows alone"}


def point(way: str, count: int) -> dict[str, Any]:
    """Audit `count` files as a user does, with duplicates and two outputs; return the row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = library(Path(name) / "library", count, seed=count, weights=False)
        began = time.perf_counter()
        child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", __spec__.name, f"--{way}", str(folder)])
        _, status, used = os.wait4(child, 0)
        wall = time.perf_counter() - began
        if status or not (Path(name) / "rows.csv").stat().st_size:
            raise SystemExit(f"the audit of {count} files ended with {status}")
    return {
        "way": way,
        "files": count,
        "wall": round(wall, 1),
        "processor": round(used.ru_utime + used.ru_stime, 1),
        "peak": round(used.ru_maxrss / 1024),
        "date": str(date.today()),
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }


def audited(folder: Path, way: str) -> None:
    """Run the command in this process."""
    from harness.commands.audit import command

    outs = [f"--out={folder.parent / name}" for name in ("rows.jsonl", "rows.csv")]
    with cluster() if way == "dask" else told(["-j", str(WORKERS)]) as options:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until this process ends
        command.main([str(folder), *outs, *options], standalone_mode=False)


@contextmanager
def told(options: list[str]) -> Any:
    yield options


@contextmanager
def cluster() -> Any:
    """Yield the options for workers that are gone afterwards, so that their time counts."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=None) as workers:
        yield ["--dask", workers.scheduler_address]


def points() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def keep(new: dict[str, Any]) -> None:
    """Put a point in the place of one of the same way and size."""
    place = new["way"], new["files"]
    kept = [each for each in points() if (each["way"], each["files"]) != place] if DATA.exists() else []
    ordered = sorted([*kept, new], key=lambda each: (list(TITLES).index(each["way"]), each["files"]))
    DATA.write_text("[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n", encoding="utf-8")


def draw(path: Path = PLOT) -> None:
    """Draw processor time per file and memory over the number of files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "audit", "font.size": 9}
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for way, title in TITLES.items():
        found = [each for each in points() if each["way"] == way]
        sizes = [each["files"] for each in found]
        if way != "rows":
            time_axes.plot(sizes, [1e3 * each["processor"] / each["files"] for each in found], "o-", label=title)
        memory_axes.plot(
            sizes, [each["peak"] for each in found], "o-", label=title, color=f"C{list(TITLES).index(way)}"
        )
    time_axes.set(xscale="log", ylim=(0, None), xlabel="files", ylabel="processor, ms per file")
    memory_axes.set(xscale="log", yscale="log", xlabel="files", ylabel="peak, MiB, largest process")
    memory_axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None, "Description": described(points())})


def described(rows: Sequence[dict[str, Any]]) -> str:
    """Return what a drawing was made of, which stands in it: a test holds it against the data."""
    return "; ".join(f"{each['way']} {each['files']}: {each['processor']} s, {each['peak']} MiB" for each in rows)


def page() -> str:
    """Return docs/audit_growth.md."""
    lines = [
        f"| {TITLES[each['way']]} | {each['files']:,} | {shown(each['wall'])} | {shown(each['processor'])} "
        f"| {shown(each['processor'] and 1e3 * each['processor'] / each['files'])} | {each['peak']} "
        f"| {each['date']}, {each['machine'].partition(',')[0]}{each.get('note', '')} |"
        for each in points()
    ]
    return _PAGE + "\n".join(lines) + "\n"


def shown(number: float | None) -> str:
    return "" if number is None else f"{number:,.1f}"


_PAGE = """# How an audit grows
![Processor time per file and the memory of the largest process over the number of files](audit_growth.svg)

`audit --out rows.jsonl --out rows.csv` of generated files: real headers of about 200 tensors, no two alike; the weights
are a hole. *Rows alone*: one process, a row stands for each file, so that only what the audit itself keeps is measured.
Peak: the largest process; torch is never imported. Two cores, shared with much other work: a wall second is none of an
idle machine, and while dask's own processes wait they use a processor a little. `python -m benchmarks.audit_growth`
measures, `python -m benchmarks.tables` writes this.

| what | files | wall, s | processor, s | ms per file | peak, MiB | measured |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main(argv: Sequence[str]) -> None:
    """Measure, keep and draw."""
    if argv and argv[0].startswith("--"):
        audited(Path(argv[1]), argv[0].removeprefix("--"))
        return
    for word in argv or DEFAULT:
        way, _, count = word.partition(":")
        new = point(way, int(count))
        print(new, flush=True)
        keep(new)
    draw()  # at last: a child's peak is at least what its parent has when it starts


if __name__ == "__main__":
    main(sys.argv[1:])
