"""The format table: one module per format, in the order in which they are recognised (most specific first)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from harness.files.format import Format
from harness.files.formats import comfyui, diffsynth, diffusers, kohya, peft

FORMATS: Mapping[str, Format] = MappingProxyType(
    {row.name: row for row in (peft.FORMAT, kohya.FORMAT, comfyui.FORMAT, diffusers.FORMAT, diffsynth.FORMAT)}
)
