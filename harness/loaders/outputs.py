"""Engines that hold no weights to read: `outputs:tool {base} {lora} {strength} {input} {out}` writes what they answer.

What comes back is a tensor, the output of the model with the LoRA on it; `checks/outputs.py` finds the scale behind it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from harness.loaders.command import run_command, words_of
from harness.loaders.declaration import Declaration
from harness.loaders.exchange import SPARE_BYTES, OutputError
from harness.loaders.protocol import OUTPUTS, Load, Outputs, Subject

if TYPE_CHECKING:
    import torch

PLACES = ("{base}", "{lora}", "{strength}", "{input}", "{out}")
USAGE = "--base {base} --lora {lora} --strength {strength} --input {input} --out {out}"


def outputs_subject(spec: str) -> Subject:
    """Return the subject `spec`; the environment variable LORA_HARNESS_COMMAND_SECONDS changes its time limit.

    Raises:
        LoaderSpecError: the line cannot be split, lacks a placeholder, or names no program.
    """
    seconds = float(os.environ.get("LORA_HARNESS_COMMAND_SECONDS", OUTPUTS.seconds))
    defaults = replace(OUTPUTS, seconds=seconds, slow=True)
    answer = cast("Load", outputs_command(spec, seconds=seconds))
    return Subject(spec, answer, None, Declaration(outputs=True), defaults)


def outputs_command(spec: str, *, seconds: float = OUTPUTS.seconds) -> Outputs:
    """Return the engine that is the command line after `outputs:`, run for at most `seconds` each time.

    Raises:
        LoaderSpecError: the line cannot be split, lacks a placeholder, or names no program.
    """
    words = words_of(spec, PLACES, USAGE)

    def answer(base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with tempfile.TemporaryDirectory(prefix="lora-harness-outputs-") as folder:
            given, out = Path(folder) / "input.safetensors", Path(folder) / "output.safetensors"
            write_inputs(inputs, given)
            found = (str(base), str(lora), repr(float(strength)), str(given), str(out))
            printed = run_command(words, dict(zip(PLACES, found, strict=True)), out, SPARE_BYTES, seconds)
            if printed:
                print(printed)  # who listens to loaders hears this one too
            return read_output(out)

    return answer


def write_inputs(inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write what a model is called with, by argument."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in inputs.items()}, path)


def read_output(path: Path) -> torch.Tensor:
    """Return the tensor in a file, whatever its name.

    Raises:
        OutputError: there is no such file, or not one tensor in it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise OutputError("the engine wrote no file at {out}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise OutputError(f"the file at {{out}} is no valid safetensors file: {error}") from error
    if len(tensors) != 1:
        raise OutputError(f"the file at {{out}} has {len(tensors)} tensors, but should have one: the model's output")
    (output,) = tensors.values()
    return output
