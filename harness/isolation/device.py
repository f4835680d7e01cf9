"""Which GPUs there are, asked so that a process forked later can still use them."""

from __future__ import annotations

from functools import cache

from harness.isolation.processes import can_fork
from harness.isolation.subject import SubjectLostError, subject_process

_SECONDS = 120.0  # a driver that sleeps takes its time to wake


@cache
def cuda_devices() -> tuple[str, ...]:
    """Return the names of the CUDA (or ROCm) devices.

    A child asks: torch's own question opens the driver, and what is forked from a process that did so cannot use it.
    """
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return ()
    if not can_fork():
        return tuple(_names())
    try:
        with subject_process(lambda order, on_part: _names(), apart=True) as asked:
            return tuple(map(str, asked.ask("names", _SECONDS)))
    except SubjectLostError:
        return ()


def _names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
