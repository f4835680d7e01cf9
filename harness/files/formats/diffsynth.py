"""DiffSynth-Studio: the model's own names, usually with PEFT's adapter name left in, alpha absent or a tensor."""

from __future__ import annotations

from harness.files.format import Format

FORMAT = Format(
    name="diffsynth",
    example="<module>.lora_A.default.weight or <module>.lora_A.weight, sometimes with <module>.alpha",
    prefixes={},
    pairs=("lora_A.default", "lora_A", "lora_down"),
    alpha=("tensor",),
    bare="always",
)
