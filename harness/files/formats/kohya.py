"""kohya sd-scripts and the many tools that write its keys: dots flattened to `_`, one `.alpha` tensor per module."""

from __future__ import annotations

from harness.files.format import Format

FORMAT = Format(
    name="kohya",
    example="lora_unet_<module_path>.lora_down.weight with lora_unet_<module_path>.alpha",
    prefixes={
        "lora_unet__": "unet",
        "lora_unet_": "unet",
        "lora_te_": "te",
        "lora_te1_": "te1",
        "lora_te2_": "te2",
        "lora_te3_": "te3",
        "lora_transformer_": "transformer",
        "lycoris_": "lycoris",
    },
    pairs=("lora_down", "lora_A"),
    alpha=("tensor",),
    flattened=True,
    write_prefix="lora_unet_",
)
