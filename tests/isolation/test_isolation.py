"""Jobs in children: their events, their order, what they print."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from harness.isolation import jobs as isolation
from harness.isolation.calls import CallFailedError, guarded
from harness.isolation.jobs import run_jobs
from harness.isolation.process import TAIL_BYTES
from tests.isolation.running import MIB, events_of, run


def test_events_come_in_order_and_ends_in_the_order_of_the_jobs():
    def job_of(number):
        def job(channel):
            time.sleep(0.1 * (2 - number))
            for step in range(3):
                channel.send((number, step))

        return job

    seen = []
    ends = run_jobs([job_of(n) for n in range(3)], workers=3, on_event=lambda i, e: seen.append((i, e)))
    assert [end.status for end in ends] == ["done"] * 3
    for number in range(3):
        assert [event for index, event in seen if index == number] == [[number, step] for step in range(3)]


def test_jobs_run_at_the_same_time_but_no_more_than_the_workers():
    def job(channel):
        channel.send(time.monotonic())
        time.sleep(0.15)
        channel.send(time.monotonic())

    times = {}
    run_jobs([job] * 4, workers=2, on_event=lambda index, at: times.setdefault(index, []).append(at))
    spans = list(times.values())
    assert max(sum(begin <= other < end for begin, end in spans) for other, _ in spans) == 2


def test_an_exception_is_told_in_one_line_with_the_traceback_in_the_tail():
    def job(channel):
        raise ValueError("first\nsecond")

    end = run(job)
    assert (end.status, end.detail) == ("raised", "ValueError: first second")
    assert "Traceback" in end.output_tail


def test_only_the_tail_of_what_is_printed_is_kept(capfd):
    def job(channel):
        for _ in range(50):
            print("x" * MIB)
        print("stderr ends", file=sys.stderr)
        print("stdout ends", end="")

    end = run(job)
    assert end.status == "done"
    assert end.output_tail.endswith("stderr ends\nstdout ends")
    assert len(end.output_tail) <= TAIL_BYTES
    assert capfd.readouterr() == ("", "")


def test_closing_stdout_harms_nobody():
    def job(channel):
        os.close(1)
        channel.send("still here")

    end, seen = events_of(job)
    assert (end.status, seen) == ("done", ["still here"])


def test_reading_the_terminal_finds_the_end_of_the_file():
    end = run(lambda channel: input())
    assert "EOFError" in str(end.detail)


def test_an_event_that_cannot_be_pickled_is_an_exception_of_the_job():
    assert run(lambda channel: channel.send(lambda: None)).status == "raised"


def test_torch_works_in_a_child_although_the_parent_used_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.randn(500, 500) @ torch.randn(500, 500)
    torch.randn(2_000_000).exp().sum()

    def job(channel):
        with channel.call("torch"):
            channel.send((torch.get_num_threads(), float((torch.ones(500, 500) @ torch.ones(500, 500)).sum())))

    try:
        ends, seen = events_of(job)
    finally:
        torch.set_num_threads(before)
    assert (ends.status, seen) == ("done", [[1, 500.0**3]])


def test_temporary_files_go_when_the_job_is_over_however_it_ends():
    def job(channel):
        channel.send(tempfile.mkdtemp())
        os._exit(1)

    _, seen = events_of(job)
    assert "lora-harness-job-" in seen[0]
    assert not Path(seen[0]).parent.exists()


def test_without_workers_an_exception_of_on_event_goes_on():
    def on_event(index, event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_jobs([lambda channel: channel.send(1)], workers=0, on_event=on_event)


def test_isolation_stands_on_nothing_but_the_ground_floor():
    folder = Path(isolation.__file__).parent
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")]
    found = {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {name for name in found if name and name.startswith("harness.")}
    ground = {"harness.errors", "harness.garbage", "harness.text"}
    assert {name for name in own if not name.startswith("harness.isolation")} == ground


def test_an_adapter_that_the_load_did_not_make_is_no_refusal() -> None:
    def load(model: torch.nn.Module) -> None:
        raise ValueError("Adapter name(s) {'mine'} not in the list of present adapters: set().")

    with pytest.raises(CallFailedError) as caught:
        guarded(torch.nn.Linear(1, 1), load, contextlib.nullcontext(), [])
    raised = caught.value.raised
    assert raised.code == "LH901"
    assert raised.what.startswith("the load made no adapter of the file, and what came next raised ValueError: Adapter")


@pytest.mark.parametrize(("number", "room"), [(errno.ENOSPC, False), (errno.ENOENT, True)])
def test_a_full_disk_is_trouble_of_the_machine_and_not_of_the_subject(number, room):
    def job(channel):
        raise OSError(number, "x")

    (end,) = run_jobs([job])
    assert (end.status, end.trouble is None) == ("raised", room)
