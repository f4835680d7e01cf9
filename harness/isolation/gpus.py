"""Keep the GPUs from a child, or give them back to one below it: a check measures on the processor, wherever it runs.

A child of a process that has asked a driver for its devices, as libraries do when they are imported, cannot use them
any more, and its limit on memory leaves a driver none of the addresses that it reserves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_ASKED: tuple[tuple[str, str, object], ...] = (
    ("cuda", "is_available", False), ("cuda", "device_count", 0), ("xpu", "is_available", False),
    ("accelerator", "is_available", False), ("accelerator", "device_count", 0), ("backends.mps", "is_available", False),
)  # fmt: skip
_undo: list[Callable[[], object]] = []


def leave_the_driver_alone() -> None:
    """Have torch tell whether there is a GPU without opening the driver here: a child could not use it then."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def hide_gpus() -> None:
    """Let this process, and what it starts, find no GPU."""
    if _undo:
        return
    for name in _VARIABLES:
        _undo.append(_setter(name, os.environ.get(name)))
        os.environ[name] = ""
    for path, name, answer in _ASKED if "torch" in sys.modules else ():
        _hide(path, name, answer)


def show_gpus() -> None:
    """Take back what `hide_gpus` did in a parent; products and convolutions in float32 are exact to float32."""
    while _undo:
        _undo.pop()()
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    if "torch" in sys.modules:
        sys.modules["torch"].backends.cudnn.allow_tf32 = False


def _hide(path: str, name: str, answer: object) -> None:
    place: Any = sys.modules["torch"]
    for part in path.split("."):
        place = getattr(place, part, None)
    if (own := getattr(place, name, None)) is not None:
        setattr(place, name, lambda: answer)
        _undo.append(lambda: setattr(place, name, own))


def _setter(name: str, value: str | None) -> Callable[[], object]:
    return lambda: os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
