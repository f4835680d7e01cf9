"""ComfyUI's own keys: the model's names behind `diffusion_model.`, any spelling of the halves, `.alpha` or none."""

from __future__ import annotations

from harness.files.format import Format

FORMAT = Format(
    name="comfyui",
    example="diffusion_model.<module>.lora_A.weight with diffusion_model.<module>.alpha",
    prefixes={
        "diffusion_model.": "diffusion_model",
        "text_encoders.": "text_encoders",
    },
    pairs=("lora_A", "lora_A.default", "lora_down"),
    alpha=("tensor",),
    write_prefix="diffusion_model.",
)
