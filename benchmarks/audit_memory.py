"""Memory of an audit of many files: a fresh one, and one that takes its rows over.

    python -m benchmarks.audit_memory [COUNT ...]

The files are empty, and the row of a real LoRA file stands for each, under a fingerprint of its own or one of a
thousand that some of them share: what is measured is what the audit itself keeps, not how it reads.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from benchmarks.tools import judged, library, table
from harness.doctor.audit import work
from harness.doctor.audit.audit import AuditOptions, audit_into
from harness.doctor.audit.output import beside, write_rows, written_rows
from harness.doctor.audit.rows import RowStore, audit_file

COUNTS = (20_000, 200_000, 1_000_000)
MOST_MIB = 953.0  # 1 GB
_SHARED = 1000
_A_FOLDER = 1000


def fake(folder: Path) -> Callable[[str, work.Task], str]:
    """Return a stand-in for reading: the row of a real file under each path."""
    real = audit_file(str(next(iter(sorted(library(folder, 1, 0).rglob("*.safetensors"))))))

    def do(path: str, task: work.Task) -> str:
        number = int(os.path.basename(path).split(".")[0])
        mark = f"{number % _SHARED if number % 10 == 0 else number + _SHARED:016x}{0:016x}"
        if task.what == "digest":
            return mark
        return real.model_copy(update={"path": path, "fingerprint": mark}).model_dump_json(exclude_none=True)

    return do


def files(folder: Path, count: int) -> None:
    """Make `count` empty files, a thousand in a folder."""
    for number in range(count):
        if number % _A_FOLDER == 0:
            os.makedirs(folder / f"{number // _A_FOLDER}")
        os.mknod(folder / f"{number // _A_FOLDER}" / f"{number:07d}.safetensors")


def audited(folder: Path, out: Path, *, resume: bool) -> float:
    """Audit as the command does, with two outputs; return the seconds."""
    began = time.perf_counter()
    with closing(RowStore(beside(out))) as store:
        options = AuditOptions(workers=1, known=written_rows(out) if resume else ())
        rows = audit_into(store, [folder], options, resume=resume)
        for path in (out, out.with_suffix(".csv")):
            write_rows(path, rows)
        store.forget()
    return time.perf_counter() - began


def peak() -> float:
    """Return the largest resident size of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(count: int) -> list[str]:
    """Return the row of the table for `count` files; in a process of its own, because the peak never goes down."""
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "library", Path(folder) / "rows.jsonl"
        work.do = fake(Path(folder) / "one")
        files(root, count)
        start, fresh = peak(), audited(root, out, resume=False)
        first, again = peak(), audited(root, out, resume=True)
        most = judged(f"{peak():,.0f}", met=peak() <= MOST_MIB)
        return [f"{count:,}", f"{start:,.0f}", f"{first:,.0f}", most, f"{fresh:,.0f}", f"{again:,.0f}"]


def row_of(count: int) -> list[str]:
    """Measure in a child."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(write, "\t".join(measured(count)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(read, 1000).decode().split("\t")


def main() -> None:
    """Print the table of all counts, or of those named."""
    rows = [row_of(int(word)) for word in sys.argv[1:] or COUNTS]
    head = ["files", "MiB before", "peak MiB, fresh", "peak MiB, resumed", "s, fresh", "s, resumed"]
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
