"""Which GPUs there are, asked so that a process forked later can still use them."""

from __future__ import annotations

import runpy
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from harness.isolation.processes import can_fork
from harness.isolation.subject import SubjectLostError, subject_process

_SECONDS = 120.0  # a driver that sleeps takes its time to wake


@cache
def cuda_devices() -> tuple[str, ...]:
    """Return the names of the CUDA (or ROCm) devices.

    A child asks: torch's own question opens the driver, and what is forked from a process that did so cannot use it.
    """
    if not _built_for_gpus():
        return ()
    if not can_fork():
        return tuple(_names())
    try:
        with subject_process(lambda order, on_part: _names(), apart=True, gpu=True) as asked:
            return tuple(map(str, asked.ask("names", _SECONDS)))
    except SubjectLostError:
        return ()


def _built_for_gpus() -> bool:
    """Tell whether torch could use any; importing it to ask takes two seconds."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    said = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return bool(said.get("cuda") or said.get("hip"))


def no_device() -> str:
    """Return the sentence for a machine without a device."""
    return f"no CUDA device that torch {version('torch') if find_spec('torch') else '(not installed)'} can use"


def _names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
