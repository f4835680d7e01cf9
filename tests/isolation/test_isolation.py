from __future__ import annotations

import ast
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

from harness.isolation import jobs as isolation
from harness.isolation.calls import CallFailedError, guarded
from harness.isolation.jobs import JobEnd, SubjectExitError, TimeLimitExceeded, run_jobs
from harness.isolation.process import TAIL_BYTES

_PTRACE_ATTACH = 16

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


def test_a_job_that_was_stopped_from_outside_goes_on():
    def job(channel):
        calling(lambda: os.kill(os.getpid(), signal.SIGSTOP))(channel)
        channel.send("found after")

    end, seen = events_of(job, seconds=5)
    assert (end.status, seen) == ("done", ["found after"])


def _traced() -> bool:
    """Let a process below this one trace it; whether the system allowed that."""
    ask, tell = os.pipe()
    if os.fork() == 0:
        os.write(tell, bytes([ctypes.CDLL(None).ptrace(_PTRACE_ATTACH, os.getppid(), 0, 0) == 0]))
        time.sleep(60)
        os._exit(0)
    return os.read(ask, 1) == b"\1"


@pytest.mark.skipif(sys.platform != "linux", reason="ptrace is Linux's")
def test_a_job_that_a_process_below_it_traces_goes_on():
    def job(channel):
        channel.send(_traced())

    end, seen = events_of(job, budget=20)
    assert end.status == "done"
    if seen == [False]:
        pytest.skip("this system lets no process trace its parent")


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


def test_an_exception_is_told_in_one_line_with_the_traceback_in_the_tail():
    def job(channel):
        raise ValueError("first\nsecond")

    end = run(job)
    assert (end.status, end.detail) == ("raised", "ValueError: first second")
    assert "Traceback" in end.output_tail


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


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("own_session", [False, True])
def test_a_kill_reaches_what_the_subject_started(own_session):
    def job(channel):
        with channel.call("load"):
            child = subprocess.Popen(["sleep", "60"], start_new_session=own_session)
            channel.send(child.pid)
            time.sleep(60)

    end, seen = events_of(job, seconds=0.5)
    assert end.status == "timeout"
    assert gone(seen[0])


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_what_a_finished_job_left_behind_is_ended_and_holds_nothing_up():
    def job(channel):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        channel.send(pid)

    end, seen = events_of(job)
    assert end.status == "done"
    assert end.seconds < 5
    assert gone(seen[0])


def test_a_process_the_subject_forked_cannot_speak_for_the_job():
    def job(channel):
        if os.fork() == 0:
            channel.send("from the copy")
            raise ValueError("in the copy")
        os.wait()
        channel.send("from the job")

    end, seen = events_of(job)
    assert (end.status, seen) == ("done", ["from the job"])


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


def test_an_exception_of_on_event_kills_the_children_and_goes_on():
    pids = []

    def job(channel):
        channel.send(os.getpid())
        time.sleep(60)

    def stop(index, event):
        pids.append(event)
        raise LookupError

    with pytest.raises(LookupError):
        run_jobs([job, job], workers=2, on_event=stop)
    assert gone(pids[0])
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_ctrl_c_kills_the_children(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, time
        from harness.isolation.jobs import run_jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        def job(channel):
            channel.send(os.getpid())
            time.sleep(60)
        run_jobs([job], on_event=lambda index, pid: print(pid, flush=True))
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=90)[1]
    assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal at the parent's death")
def test_children_die_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nfrom harness.isolation.jobs import run_jobs\n"
        "def job(channel):\n    channel.send(os.getpid())\n    time.sleep(60)\n"
        "run_jobs([job], on_event=lambda index, pid: print(pid, flush=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        pid = int(process.stdout.readline())
        process.kill()
    assert gone(pid)


def test_forking_does_not_warn_and_leaves_the_filters_as_they_were(monkeypatch):
    fork = os.fork

    def fork_of_python_3_12():
        text = "This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks in the child."
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return fork()

    monkeypatch.setattr(os, "fork", fork_of_python_3_12)
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(lambda channel: None).status == "done"
    assert warnings.filters == filters


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


def recurse_forever():
    recurse_forever()


def test_ctrl_c_during_a_call_here_ends_the_run():
    def job(channel):
        with channel.call("load"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], workers=0)


def test_a_subject_cannot_swallow_the_time_limit_as_an_exception():
    assert not issubclass(TimeLimitExceeded, Exception)


def test_a_process_that_has_initialised_cuda_is_not_forked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seen = []
    end = run_jobs([lambda channel: channel.send(os.getpid())], on_event=lambda i, pid: seen.append(pid))[0]
    assert (end.status, seen) == ("done", [os.getpid()])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_call_may_name_a_limit_of_its_own(workers):
    def job(channel):
        with channel.call("longer", 20):
            time.sleep(0.3)
        with channel.call("shorter", 0.2):
            time.sleep(60)

    end = run(job, seconds=0.1, workers=workers)
    assert (end.status, end.detail) == ("timeout", "shorter: no answer within 0.2 s")


def test_without_workers_an_exception_of_on_event_goes_on():
    def on_event(index, event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_jobs([lambda channel: channel.send(1)], workers=0, on_event=on_event)


def test_isolation_stands_on_nothing_but_errors_and_text():
    folder = Path(isolation.__file__).parent
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")]
    found = {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {name for name in found if name and name.startswith("harness.")}
    assert {name for name in own if not name.startswith("harness.isolation")} == {"harness.errors", "harness.text"}


def test_an_adapter_that_the_load_did_not_make_is_no_refusal() -> None:
    def load(model: torch.nn.Module) -> None:
        raise ValueError("Adapter name(s) {'mine'} not in the list of present adapters: set().")

    with pytest.raises(CallFailedError) as caught:
        guarded(torch.nn.Linear(1, 1), load, contextlib.nullcontext(), [])
    raised = caught.value.raised
    assert raised.code == "LH901"
    assert raised.what.startswith("the load made no adapter of the file, and what came next raised ValueError: Adapter")
