"""No process stays, and none that comes from elsewhere stops a job: kills, forks, signals, tracing, Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch

from harness.isolation.jobs import run_jobs
from tests.isolation.running import calling, events_of, gone, run

_PTRACE_ATTACH = 16


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


def test_ctrl_c_during_a_call_here_ends_the_run():
    def job(channel):
        with channel.call("load"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], workers=0)


def test_a_process_that_has_initialised_cuda_is_not_forked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seen = []
    end = run_jobs([lambda channel: channel.send(os.getpid())], on_event=lambda i, pid: seen.append(pid))[0]
    assert (end.status, seen) == ("done", [os.getpid()])
