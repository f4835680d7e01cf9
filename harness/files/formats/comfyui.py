"""ComfyUI's own keys: the model's names behind `diffusion_model.`, any spelling of the halves, `.alpha` or none.

Beside the pair a module may have a whole `.diff`, `.diff_b`, `.set_weight`, `.w_norm`, `.b_norm`. ai-toolkit writes
the same keys without alpha (alpha = rank by construction): a dialect, known by its metadata only.
"""

from __future__ import annotations

from harness.files.format import Format

FORMAT = Format(
    name="comfyui",
    example="diffusion_model.<module>.lora_A.weight with diffusion_model.<module>.alpha",
    prefixes={
        "diffusion_model.": "diffusion_model",
        "text_encoders.": "text_encoders",
    },
    pairs=("lora_A", "lora_A.default", "lora_down", "lora.down", "lora_linear_layer.down", "bare"),
    alpha=("tensor",),
    write_prefix="diffusion_model.",
    dialects={"ai-toolkit": "#software=.*ai-toolkit", "bfl": r"diffusion_model\.(double|single)_blocks\."},
)
