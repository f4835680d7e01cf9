"""What a job may take: a call that hangs, dies, leaks or raises costs its own outcome."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.isolation import subject
from harness.isolation.jobs import SubjectExitError, TimeLimitExceeded, run_jobs
from harness.isolation.limits import alarm
from harness.isolation.subject import subject_process
from tests.isolation.running import MIB, calling, events_of, recurse_forever, run

HANGS = {
    "in Python": lambda: time.sleep(60),
    "in C, holding the interpreter lock": lambda: ctypes.PyDLL(None).sleep(60),
    "printing without end": lambda: [os.write(1, b"y" * 10_000) for _ in iter(int, 1)],
    "after catching everything": lambda: [_sleep_through() for _ in iter(int, 1)],
    "with the alarm blocked": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)), time.sleep(60)),
}


def _sleep_through():
    with contextlib.suppress(BaseException):
        time.sleep(60)


@pytest.mark.parametrize("how", HANGS)
def test_a_call_that_hangs_is_ended_and_what_came_before_is_kept(how):
    def job(channel):
        channel.send("found before")
        calling(HANGS[how])(channel)

    end, seen = events_of(job, seconds=0.3)
    assert (end.status, end.detail, end.last_label) == ("timeout", "load: no answer within 0.3 s", "load")
    assert seen == ["found before"]
    assert end.seconds < 5


def test_only_calls_are_limited_and_each_has_its_own_time():
    def job(channel):
        time.sleep(0.4)
        for _ in range(3):
            with channel.call("short"):
                time.sleep(0.15)

    assert run(job, seconds=0.35).status == "done"


def test_a_busy_parent_kills_no_child_that_answered_in_time():
    def answers(channel):
        calling(lambda: time.sleep(0.2))(channel)
        time.sleep(0.7)

    def speaks(channel):
        time.sleep(0.1)
        channel.send("takes the parent half a second")

    ends = run_jobs(
        [answers, speaks],
        workers=2,
        seconds_per_call=0.3,
        on_event=lambda index, event: time.sleep(0.5),
    )
    assert [end.status for end in ends] == ["done", "done"]


DEATHS = {
    "the process ended with exit status 3 in load": lambda: os._exit(3),
    "killed by SIGKILL in load": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "killed by SIGSEGV in load": lambda: ctypes.string_at(0),
    "killed by SIGINT in load": lambda: os.kill(os.getpid(), signal.SIGINT),
    "the process ended with exit status 0 in load": lambda: os.closerange(3, 1000),
}


@pytest.mark.parametrize("detail", DEATHS)
def test_a_call_that_kills_its_process_costs_that_job_only(detail):
    ends = run_jobs([calling(DEATHS[detail]), calling(lambda: None)], workers=2)
    assert [(end.status, end.detail) for end in ends] == [("killed", detail), ("done", None)]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_call_cannot_end_the_job_by_raising(error):
    def attempt():
        raise error

    def job(channel):
        try:
            calling(attempt)(channel)
        except SubjectExitError as caught:
            channel.send(str(caught))

    end, seen = events_of(job)
    assert (end.status, seen) == ("done", [f"raised {error!r}"])


def test_endless_recursion_is_an_exception():
    def recurse():
        recurse()

    end = run(calling(recurse))
    assert (end.status, end.last_label) == ("raised", "load")
    assert "RecursionError" in str(end.detail)


LEAKS = {
    "python": lambda: [bytearray(8 * MIB) for _ in iter(int, 1)],
    "torch": lambda: [torch.empty(8 * MIB) for _ in iter(int, 1)],
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and limits the address space")
@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_ends_at_the_memory_limit(kind):
    end = run(calling(LEAKS[kind]), memory_limit=150 * MIB)
    assert (end.status, end.last_label) == ("memory", "load")


def test_a_job_that_stays_below_the_memory_limit_is_done():
    assert run(calling(lambda: len(bytearray(50 * MIB))), memory_limit=200 * MIB).status == "done"


def test_without_workers_the_jobs_run_here_and_python_code_is_limited():
    def hang(channel):
        channel.send(os.getpid())
        with channel.call("load"), contextlib.suppress(Exception):
            time.sleep(60)

    def exits(channel):
        with channel.call("load"):
            sys.exit(3)

    seen = []
    jobs = [hang, exits, calling(recurse_forever), lambda channel: channel.send("last")]
    ends = run_jobs(jobs, workers=0, seconds_per_call=0.2, on_event=lambda index, event: seen.append(event))
    assert [end.status for end in ends] == ["timeout", "raised", "raised", "done"]
    assert ends[0].detail == "load: no answer within 0.2 s"
    assert seen == [os.getpid(), "last"]
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_subject_cannot_swallow_the_time_limit_as_an_exception():
    assert not issubclass(TimeLimitExceeded, Exception)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_call_may_name_a_limit_of_its_own(workers):
    def job(channel):
        with channel.call("longer", 20):
            time.sleep(0.3)
        with channel.call("shorter", 0.2):
            time.sleep(60)

    end = run(job, seconds=0.1, workers=workers)
    assert (end.status, end.detail) == ("timeout", "shorter: no answer within 0.2 s")


@contextlib.contextmanager
def one_crowded_processor(others: int) -> Iterator[None]:
    """Keep this process, and what it forks, on one processor, where others never sleep."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def _work(order: float, on_part: object) -> str:
    """Use `order` seconds of a processor."""
    end = time.process_time() + order
    while time.process_time() < end:
        pass
    return "done"


def _work_under_an_alarm(order: float, on_part: object) -> str:
    try:
        with alarm(1.5, "late"):
            return _work(order, on_part)
    except TimeLimitExceeded as late:
        return str(late)


CROWD = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel keeps no account of waiting")


@CROWD
@pytest.mark.parametrize("answer", [_work, _work_under_an_alarm])
def test_waiting_for_a_processor_is_no_time_of_the_call(answer, monkeypatch):
    monkeypatch.setattr(subject, "GRACE_SECONDS", 0.1)
    with one_crowded_processor(3), subject_process(answer, apart=True) as asked:
        asked.ask(0.0, 20.0)
        began = time.monotonic()
        assert asked.ask(0.8, 1.5) == "done"
        assert time.monotonic() - began > 1.6, "nobody else was on that processor"


@CROWD
def test_a_call_that_never_ends_on_a_crowded_processor_is_late():
    with one_crowded_processor(2), subject_process(_work_under_an_alarm, apart=True) as asked:
        assert asked.ask(1e9, 20.0) == "late"


class _Slow:
    """Something that takes longer to start than a call may, and ends with the order "end"."""

    def __init__(self) -> None:
        self.runs = self.began = False

    def start(self) -> None:
        time.sleep(0.4)
        self.runs = self.began = True

    def is_over(self) -> bool:
        return self.began and not self.runs

    def answer(self, order: object, on_part: object) -> bool:
        with alarm(0.2):
            if not self.runs:
                self.start()
        self.runs = order != "end"
        return True


@pytest.mark.parametrize("apart", [True, False])
def test_what_ended_is_started_again_outside_the_time_of_the_next_call(apart: bool) -> None:
    slow = _Slow()
    with subject_process(slow.answer, prepare=slow.start, is_over=slow.is_over, apart=apart) as asked:
        assert all(asked.ask(order, 5.0) for order in ("go on", "end", "go on", "end", "go on"))
