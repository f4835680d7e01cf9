"""Loaders that harm the process they run in, on purpose or not. `OUTCOMES` says what a check must make of each."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.files import match_modules, read_lora

Load = Callable[..., Any]
PLAIN = {"A", "B", "alpha"}
RIGHT = (None, "passed")
DIED, HUNG, RAISED = ("LH901", "process died"), ("LH901", "no answer within"), ("LH901", "")
LOADERS: dict[str, Load] = {}
OUTCOMES: dict[str, tuple[str | None, str]] = {}
_KEPT: list[object] = []
SECONDS = str(86_400 + os.getpid())  # tells what is left of one test process from what is of another


def merge(model: nn.Module, lora: Path, strength: float, wrong: float = 1.0) -> None:
    adapter, layers = read_lora(lora), dict(model.named_modules())
    with torch.no_grad():
        names, unmatched = match_modules(adapter, layers)
        if unmatched or adapter.unused_keys or {key for m in adapter.modules.values() for key in m.keys} - PLAIN:
            raise NotImplementedError("only A, B and alpha of layers that the model has are read")
        for name, layer in names.items():
            a, b = (half.float() for half in adapter.tensors(name))
            layers[layer].weight += wrong * strength * adapter.modules[name].trained_scale * (b @ a)  # type: ignore[operator]


def _ends(
    code: str | None, what: str, *, after: bool = False, wrong: float = 1.0
) -> Callable[[Callable[[], Any]], Load]:
    """Make a loader of something harmful, done before or `after` a merge, and say what a check must find."""

    def make(harm: Callable[..., Any]) -> Load:
        def load(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
            if after:
                merge(model, lora, strength, wrong)
            harm()
            if not after:
                merge(model, lora, strength, wrong)

        load.__qualname__ = load.__name__ = harm.__name__
        LOADERS[harm.__name__], OUTCOMES[harm.__name__] = load, (code, what)
        return load

    return make


@_ends(*DIED)
def leaves_with_exit_status_0() -> None:
    os._exit(0)


@_ends(*DIED)
def reads_address_0() -> None:
    ctypes.string_at(0)


@_ends(*DIED)
def closes_every_descriptor() -> None:
    os.closerange(0, 256)


@_ends(*HUNG)
def stops_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@_ends("LH901", "measurements without their weights", after=True, wrong=3)
def saves_no_tensors() -> None:
    import safetensors.torch

    safetensors.torch.save = lambda *arguments: b""


@_ends(*RIGHT, after=True)
def stops_its_judge() -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(0.2)


@_ends(*DIED)
def kills_its_judge() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1)


@_ends(*HUNG, after=True)
def a_thread_stops_it_later() -> None:
    threading.Thread(target=lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGSTOP)), daemon=True).start()


@_ends(*HUNG)
def sleeps_with_signals_blocked() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    time.sleep(300)


@_ends(*HUNG)
def prints_without_end() -> None:
    while True:
        os.write(1, b"y" * (1 << 20))


@_ends(*HUNG, after=True)
def torch_sleeps_when_it_is_measured() -> None:
    torch.Tensor.double = lambda self: time.sleep(300)  # type: ignore[method-assign,assignment]


class _BlocksWhenDropped:
    def __del__(self) -> None:
        time.sleep(300)


@_ends("LH901", "no answer within", after=True)
def blocks_when_it_is_dropped() -> None:
    _BlocksWhenDropped()


@_ends(*RIGHT, after=True)
def leaves_threads_running() -> None:
    threading.stack_size(1 << 18)  # dozens of loads must not run into the limit of memory
    for _ in range(4):
        threading.Thread(target=time.sleep, args=(300,)).start()


@_ends(*RIGHT, after=True)
def leaves_a_process_in_a_session_of_its_own() -> None:
    subprocess.Popen(["sleep", SECONDS], start_new_session=True)


@_ends(*RIGHT, after=True)
def leaves_a_daemon() -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", SECONDS])
        os._exit(0)
    os.wait()


@_ends(*HUNG)
def forks_and_forks() -> None:
    for _ in range(40):
        if os.fork() == 0:
            os.setsid()
            os.execvp("sleep", ["sleep", SECONDS])
    time.sleep(300)


@_ends(*RIGHT, after=True)
def leaves_shared_memory() -> None:
    Path(f"/dev/shm/lora-harness-test-{os.getpid()}").write_bytes(b"x" * 1000)


@_ends(*RIGHT, after=True)
def leaves_temporary_files() -> None:
    tempfile.mkstemp()


@_ends(*RAISED)
def takes_too_much_memory() -> None:
    _KEPT.append(bytearray(8 << 30))


@_ends(*RAISED)
def takes_too_much_memory_in_torch() -> None:
    while True:
        _KEPT.append(torch.ones(1 << 27))


@_ends(*RIGHT, after=True)
def prints_much() -> None:
    os.write(1, b"x" * (1 << 22))


@_ends(*RIGHT, after=True)
def goes_to_another_folder() -> None:
    os.chdir("/")


@_ends(None, "", after=True, wrong=3.0)
def makes_all_tensors_equal() -> None:
    torch.equal = lambda a, b: True  # type: ignore[assignment]


OUTCOMES["makes_all_tensors_equal"] = ("LH209", "")


@_ends("LH901", "", after=True)
def breaks_json_and_isinstance() -> None:
    json.loads = json.dumps = lambda *a, **k: {}  # type: ignore[assignment]
    pickle.dumps = lambda *a, **k: b"junk"  # type: ignore[assignment]
    builtins.isinstance = lambda *a: True  # type: ignore[assignment]


@_ends(*RAISED)
def raises_system_exit() -> None:
    sys.exit("bye\x1b[31m")


@_ends(*RAISED)
def raises_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


@_ends(*RAISED)
def raises_what_has_no_text() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    raise MuteError


@_ends("LH901", "", after=True)
def removes_its_temporary_folder_twice() -> None:
    shutil.rmtree(os.environ["TMPDIR"])


def _pipes() -> list[int]:
    return [n for n in range(3, 64) if Path(f"/proc/self/fd/{n}").is_fifo()]


def _forge(body: bytes) -> None:
    for descriptor in _pipes():
        with contextlib.suppress(OSError):
            os.write(descriptor, struct.pack(">Q", len(body)) + body)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ.get('LORA_HARNESS_TEST_MARK', '/dev/null')}",)


@_ends("LH901", "its process sent")
def forges_a_pickle() -> None:
    _forge(pickle.dumps(("event", _Evil())))
    time.sleep(0.5)


@_ends("LH901", "its process sent")
def forges_a_length() -> None:
    for descriptor in _pipes():
        with contextlib.suppress(OSError):
            os.write(descriptor, struct.pack(">Q", 1 << 60) + b"z" * 1000)
    time.sleep(0.5)


@_ends("LH901", "", wrong=3.0)
def forges_a_verdict_and_leaves() -> None:
    text = json.dumps({"number": 1, "answer": {"verdict": {"loader": "x", "check": "scale", "outcome": "passed"}}})
    _forge(struct.pack(">I", len(text)) + text.encode())
    _forge(struct.pack(">I", 16) + b'{"finish":"done"}'[:16])
    os._exit(0)


@_ends("LH901", "", wrong=3.0)
def forges_that_it_is_done() -> None:
    text = b'{"finish": "done", "detail": null}'
    _forge(struct.pack(">I", len(text)) + text)
    os._exit(0)


@_ends(*RIGHT, after=True)
def writes_no_files_any_more() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


class _Wrapper(nn.Module):
    """Right for one unit vector at a time, five times as strong for what a model sends."""

    def __init__(self, base: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.base, self.delta = base, delta

    def forward(self, x: Tensor) -> Tensor:
        dense = (x != 0).sum(-1, keepdim=True) > 1
        answer: Tensor = self.base(x) + torch.where(dense, 5.0, 1.0) * (x @ self.delta.T)
        return answer


def right_on_unit_vectors(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    adapter, layers = read_lora(lora), dict(model.named_modules())
    for name, layer in match_modules(adapter, layers)[0].items():
        a, b = (half.float() for half in adapter.tensors(name))
        delta = strength * adapter.modules[name].trained_scale * (b @ a)
        model.set_submodule(layer, _Wrapper(layers[layer], delta))


def returns_something_else(model: nn.Module, lora: Path, *, strength: float = 1.0) -> object:
    return _Evil()


LOADERS |= {"right_on_unit_vectors": right_on_unit_vectors, "returns_something_else": returns_something_else}
OUTCOMES |= {"right_on_unit_vectors": ("LH305", ""), "returns_something_else": ("LH902", "")}
