"""What is done where an engine's code runs that gives only outputs: hand it the model, the LoRA and the inputs."""

from __future__ import annotations

import atexit
import inspect
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches import Bench, get_bench
from harness.isolation.calls import Raised, raised_by
from harness.isolation.limits import TimeLimitExceeded, alarm
from harness.loaders.protocol import Outputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def answer_outputs(outputs: Outputs, bench_name: str, step: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Have the engine answer with the file and at the strength of one `step`; return its output, or what it raised."""
    (_, strength, path), bench = step, get_bench(bench_name)
    folder, inputs = base_folder(bench_name), inputs_of(bench)
    try:
        with alarm(seconds):
            output = outputs(folder, Path(path), strength=1.0 if strength is None else strength, inputs=inputs)
        return _told(output)
    except TimeLimitExceeded as late:
        return {"raised": asdict(Raised("LH901", str(late), timed_out=True))}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an engine that raises SystemExit is data, not the end of the run
        return {"raised": asdict(raised_by(error))}


def _told(output: Any) -> dict[str, Any]:
    """Return what an engine answered as a tensor; what NumPy or a list of numbers holds is one too."""
    import torch

    try:
        return {"tensors": {"output": torch.as_tensor(output).detach().double().cpu()}}
    except (TypeError, ValueError, RuntimeError):
        what = f"the engine answers {type(output).__name__}, but should answer a tensor"
        return {"raised": asdict(Raised("LH902", what))}


@cache
def base_folder(bench: str) -> Path:
    """Return a folder of this process with the bench's model as `save_pretrained` writes it."""
    folder = Path(tempfile.mkdtemp(prefix="lora-harness-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model: Any = get_bench(bench).build()
    model.save_pretrained(folder)
    return folder


def inputs_of(bench: Bench) -> dict[str, Tensor]:
    """Return the tensors that the bench's model is called with, by the name of the argument."""
    import torch

    model, seen = bench.build(), dict[str, "Tensor"]()
    names = list(inspect.signature(model.forward).parameters)

    def keep(module: torch.nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **keywords}
        seen.update({name: value for name, value in given.items() if isinstance(value, torch.Tensor)})

    with model.register_forward_pre_hook(keep, with_kwargs=True):
        bench.forward(model)
    return seen
