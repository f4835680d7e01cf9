"""The work of an audit in batches: in children of this process, or as a process of its own on any executor's worker.

`python -m harness.doctor.audit.work` reads one batch as JSON from stdin and prints one line of JSON per result.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate, pairwise
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.doctor.audit.rows import audit_file, digest
from harness.doctor.inspect.describe import not_judged, unreadable
from harness.errors import UserError
from harness.isolation.jobs import Channel, Job, JobEnd, run_jobs

MOST_LOCAL = 128  # paths in a batch: a child costs as much as a few rows
MOST_REMOTE = 1024  # and a process with an interpreter of its own as much as a hundred
_ATTEMPTS = 3
_SLICE_SECONDS = 0.1
_PLACE_BYTES = 8
_PATIENCE = 20.0  # seconds without a result after which an executor is asked for its workers
_START_SECONDS = 60.0  # for a worker's own process to start and to end


@dataclass(frozen=True)
class Task:
    """What to do with every path of a batch: `row` (inspect it) or `digest` (hash its weights), within limits."""

    what: str = "row"
    energy: bool = False
    seconds: float = 30.0
    memory: int = 1 << 30

    @property
    def is_quick(self) -> bool:
        """Tell whether only headers are read: batches of what takes seconds must be small to end together."""
        return self.what == "row" and not self.energy


Result = tuple[str, str]  # path, and the row as JSON or the digest
OnResult = Callable[[str, str], None]


def run_local(paths: Sequence[str], task: Task, *, workers: int, on_result: OnResult) -> None:
    """Do `task` for every path in forked children; a path that hangs, crashes or eats memory gets a row saying so.

    Each child does a batch and hands over what it has a few times a second. When it dies, the path at which it was is
    the one to blame; what it had not handed over yet is done again with the rest of its batch.
    """
    if task.energy and workers:
        import_module("harness.doctor.inspect.energy")  # once here, not once in every child
    if task.what == "row" and workers:
        read_tables()
    room = task.memory + max(map(_size, paths), default=0)
    most = MOST_LOCAL if task.is_quick else MOST_LOCAL // 16
    waiting = list(_batches(paths, min(most, len(paths) // (4 * max(workers, 1)))))
    again: set[str] = set()
    while waiting:
        waiting = list(_round(waiting, task, workers, room, on_result, again))


@cache
def read_tables() -> None:
    """Have a row made here of two usual files: in every child the tables for it cost as much as half a batch."""
    halves = {f"{stem}.{half}.weight": (2, 2) for stem, names in _USUAL.items() for half in names}
    for stem in _USUAL:
        shapes = {name: shape for name, shape in halves.items() if name.startswith(stem)}
        with TemporaryDirectory(prefix="lora-harness-audit-") as folder:
            path = Path(folder, "usual.safetensors")
            path.write_bytes(_zeros(shapes))
            audit_file(str(path))


_USUAL = {
    "lora_unet_transformer_blocks_0_attn_to_q": ("lora_down", "lora_up"),
    "transformer.transformer_blocks.0.attn.to_q": ("lora_A", "lora_B"),
}  # stem and halves, as kohya and diffusers spell them


def _zeros(shapes: Mapping[str, tuple[int, int]]) -> bytes:
    """Return a safetensors file of zeros in half precision."""
    ends = [0, *accumulate(2 * rows * columns for rows, columns in shapes.values())]
    header = {
        name: {"dtype": "F16", "shape": shape, "data_offsets": place}
        for (name, shape), place in zip(shapes.items(), pairwise(ends), strict=True)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(ends[-1])


def _round(
    batches: list[list[str]], task: Task, workers: int, room: int, on_result: OnResult, again: set[str]
) -> Iterator[list[str]]:
    """Do every batch once; yield what is left of those that ended early, without the paths that ended them.

    Of a process that was killed from outside the path is tried once more alone; from then on it is in `again`.
    """
    places = memoryview(mmap(-1, _PLACE_BYTES * len(batches))).cast("q")  # shared with the children
    done = [0] * len(batches)

    def arrived(index: int, event: Any) -> None:
        for path, result in event:
            done[index] += 1
            on_result(path, result)

    ends = run_jobs(
        [_job(batch, task, places[index : index + 1]) for index, batch in enumerate(batches)],
        workers=workers,
        seconds_per_call=task.seconds + _SLICE_SECONDS,
        memory_limit=room,
        on_event=arrived,
    )
    for index, (batch, end) in enumerate(zip(batches, ends, strict=True)):
        if done[index] < len(batch):
            at = max(places[index], done[index])
            if end.from_outside and batch[at] not in again:
                again.add(batch[at])
                yield [batch[at]]
            else:
                on_result(batch[at], _failure(batch[at], task, _said(end, task), blamed=not end.from_outside))
            if rest := batch[done[index] : at] + batch[at + 1 :]:
                yield rest


def _job(batch: Sequence[str], task: Task, place: memoryview[int]) -> Job:
    owner = os.getpid()

    def job(channel: Channel) -> None:
        if os.getpid() != owner:
            gc.freeze()  # or every collection would look through all that was imported before the fork
        while place[0] < len(batch):
            with channel.call(batch[place[0]]):
                results = _slice(batch, task, place)
            channel.send(results)

    return job


def _slice(batch: Sequence[str], task: Task, place: memoryview[int]) -> list[Result]:
    """Do paths of `batch` for a moment, one at least; a limit or a message for each would cost more than its row."""
    results: list[Result] = []
    began = time.monotonic()
    while place[0] < len(batch) and (not results or time.monotonic() - began < _SLICE_SECONDS):
        path = batch[place[0]]
        results.append((path, do(path, task)))
        place[0] += 1
    return results


def do(path: str, task: Task) -> str:
    """Do the task for one path; return the row as JSON, or the digest."""
    if task.what == "row":
        return audit_file(path, energy=task.energy).model_dump_json(exclude_none=True)
    try:
        return digest(path)
    except UserError:
        return ""


def _failure(path: str, task: Task, what: str, *, blamed: bool) -> str:
    row = unreadable(path, what) if blamed else not_judged(path, what)
    return row.model_dump_json() if task.what == "row" else ""


def _said(end: JobEnd, task: Task) -> str:
    if end.status == "timeout":
        return f"no answer within {task.seconds:g} s"
    if end.status == "memory":
        return f"needs more than {task.memory / 2**20:,.0f} MiB of memory"
    return end.detail or f"the process that read it ended ({end.status})"


def _size(path: str) -> int:
    """Return the size that mapping a file adds to the address space of a process."""
    try:
        if os.path.isdir(path):
            return max((entry.stat().st_size for entry in os.scandir(path)), default=0)
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _batches(paths: Sequence[str], size: int) -> Iterator[list[str]]:
    size = max(1, size)
    for start in range(0, len(paths), size):
        yield list(paths[start : start + size])


def run_on(executor: Executor, paths: Sequence[str], task: Task, *, on_result: OnResult) -> None:
    """Do `task` on the workers of any executor; a batch whose worker dies is given to another one."""
    most = MOST_REMOTE if task.is_quick else MOST_REMOTE // 32
    waiting = [(batch, 1) for batch in _batches(paths, min(most, len(paths) // 8))]
    while waiting:
        futures = {executor.submit(run_batch, batch, asdict(task)): (batch, time) for batch, time in waiting}
        waiting = []
        for future in _completed(set(futures), executor):
            batch, attempt = futures.pop(future)  # its result goes with it
            results, problem = _outcome(future)
            for path, result in results:
                on_result(path, result)
            rest = [path for path in batch if path not in dict(results)]
            if rest and attempt < _ATTEMPTS:
                waiting.append((rest, attempt + 1))
            else:
                for path in rest:
                    on_result(path, _failure(path, task, problem, blamed=False))


def _completed(left: set[Future[list[Result]]], executor: Executor) -> Iterator[Future[list[Result]]]:
    """Yield the futures as they end, and keep none.

    Raises:
        UserError: the executor says that it has no worker left.
    """
    has_workers: Callable[[], bool] = getattr(executor, "has_workers", lambda: True)
    while left:
        done, left = wait(left, _PATIENCE, FIRST_COMPLETED)
        if not done and not has_workers():
            raise UserError("no worker is left to read files: start some, then run this again with --resume")
        while done:
            yield done.pop()


def _outcome(future: Future[list[Result]]) -> tuple[list[Result], str]:
    try:
        return future.result(), ""
    except Exception as error:
        return [], f"the worker failed ({type(error).__name__})"


def run_batch(paths: list[str], options: dict[str, object]) -> list[Result]:
    """Do one batch in a process of its own: an executor's worker may run threads, which must not be forked.

    Raises:
        RuntimeError: that process died without an answer.
    """
    task = Task(**options)  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-m", "harness.doctor.audit.work"],
        input=json.dumps({"paths": paths, "task": options}),
        capture_output=True,
        text=True,
        check=False,
        timeout=_START_SECONDS + task.seconds * len(paths),
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-500:]}")
    return [(path, result) for path, result in map(json.loads, done.stdout.splitlines())]


def main(lines: Iterable[str] | None = None) -> None:
    """Do the batch on stdin."""
    order = json.loads("".join(sys.stdin if lines is None else lines))
    run_local(order["paths"], Task(**order["task"]), workers=1, on_result=lambda *pair: print(json.dumps(pair)))


if __name__ == "__main__":
    main()
