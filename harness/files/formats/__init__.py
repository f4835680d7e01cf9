"""The format table: one module per format, in the order in which they are recognised (most specific first).

A row is what differs in the grammar of prefixes, in the spelling of the halves or in the home of alpha. What differs
only in the words of a module path, or in the tool that wrote it, is a dialect of a row: see the docstrings of `kohya`
(FLUX, SDXL, musubi-tuner, OneTrainer, LyCORIS), `peft` (fal, Kontext), `comfyui` and `diffusers` (ai-toolkit).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from harness.files.format import Format
from harness.files.formats import (
    attn_procs,
    bfl_control,
    comfyui,
    diffsynth,
    diffusers,
    gguf,
    kohya,
    mlx,
    peft,
    xlabs,
)

_MODULES = (peft, kohya, xlabs, attn_procs, comfyui, diffusers, mlx, gguf, bfl_control, diffsynth)
FORMATS: Mapping[str, Format] = MappingProxyType({module.FORMAT.name: module.FORMAT for module in _MODULES})
