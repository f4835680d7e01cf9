"""PEFT: a folder with `adapter_model.safetensors` and `adapter_config.json`, which holds rank and alpha.

Trainers of FLUX that name the original model's layers (`base_model.model.double_blocks.…`: fal, Kontext, FLUX.2) save
the same file, usually without the configuration: a dialect, whose alpha is lost.
"""

from __future__ import annotations

from harness.files.format import Format

FORMAT = Format(
    name="peft",
    example="base_model.model.<module>.lora_A.weight beside adapter_config.json",
    prefixes={"base_model.model.": ""},
    pairs=("lora_A", "lora_A.default", "lora_embedding_A"),
    alpha=("config", "tensor"),
    bare="config",
    folder=True,
    write_prefix="base_model.model.",
    metadata={"format": "pt"},
    dialects={"bfl": r"base_model\.model\.(double|single)_blocks\."},
)
