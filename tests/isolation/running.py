"""Jobs of the tests: run one, keep what it sends, look whether a process is gone."""

from __future__ import annotations

import time
from pathlib import Path

from harness.isolation.jobs import JobEnd, run_jobs

MIB = 1 << 20


def run(job, *, seconds=20.0, **options) -> JobEnd:
    return run_jobs([job], seconds_per_call=seconds, **options)[0]


def events_of(job, **options):
    seen = []
    end = run(job, on_event=lambda index, event: seen.append(event), **options)
    return end, seen


def calling(function):
    def job(channel):
        with channel.call("load"):
            function()

    return job


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


def recurse_forever():
    recurse_forever()
