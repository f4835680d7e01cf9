"""LoRA files: a path in, a `LoraAdapter` out, and back. Imports neither torch nor numpy until tensors are asked for."""

from __future__ import annotations

from harness.files.adapter import (
    LoraAdapter,
    LoraModule,
    LoraParts,
    LoraWeights,
    Problem,
    flattened_collisions,
    match_modules,
    with_alpha,
)
from harness.files.format import Format, Naming, Source
from harness.files.formats import FORMATS
from harness.files.read import detect_format, read_lora
from harness.files.safetensors_file import SafetensorsFile, read_header
from harness.files.tensor_file import Extent, TensorFile, TensorInfo
from harness.files.write import write_lora

__all__ = [
    "FORMATS",
    "Extent",
    "Format",
    "LoraAdapter",
    "LoraModule",
    "LoraParts",
    "LoraWeights",
    "Naming",
    "Problem",
    "SafetensorsFile",
    "Source",
    "TensorFile",
    "TensorInfo",
    "detect_format",
    "flattened_collisions",
    "match_modules",
    "read_header",
    "read_lora",
    "with_alpha",
    "write_lora",
]
