"""kohya sd-scripts and the many tools that write its keys: dots flattened to `_`, one `.alpha` tensor per module.

Dialects, which differ only in the words of the module path and are read alike: FLUX (`lora_unet_double_blocks_…`,
fused q, k, v; with `split_qkv` the halves are block-diagonal, rank 3r or 4r, and alpha still belongs to r: see
`blocks`), SDXL (`lora_unet_input_blocks_…`), musubi-tuner (`lora_unet_blocks_…`), the doubled underscore
(`lora_unet__…`), OneTrainer (`lora_transformer_…`), and LyCORIS as SimpleTuner saves it (`lycoris_…`).
"""

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
    dialects={
        "onetrainer": "lora_transformer_",
        "lycoris": "lycoris_",
        "double-underscore": "lora_unet__",
        "flux": r"lora_unet_(double|single)_blocks_",
        "sdxl": r"lora_unet_(input|output)_blocks_|lora_unet_middle_block_",
        "sd": r"lora_unet_((down|up)_blocks|mid_block)_",
        "musubi": r"lora_unet_(transformer_)?blocks_\d+_",
    },
)
