"""diffusers: the component's name before the module path, alpha in the header's `lora_adapter_metadata` or nowhere.

`transformer.….lora_down.weight` with an `.alpha` tensor (OneTrainer's and others' way) is a dialect: only the spelling
differs, and alpha is read from either home. So is ai-toolkit's file without any alpha, known by its metadata.
"""

from __future__ import annotations

from harness.files.format import Format

COMPONENTS = (
    "transformer", "transformer_2", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "connectors",
    "prior", "controlnet",
)  # fmt: skip

FORMAT = Format(
    name="diffusers",
    example="transformer.<module>.lora_A.weight, alpha in the header's lora_adapter_metadata",
    prefixes={f"{component}.": component for component in COMPONENTS},
    pairs=("lora_A", "lora.down", "lora_down", "lora_linear_layer.down", "lora_A.default"),
    alpha=("header", "tensor"),
    bare="header",
    write_prefix="transformer.",
    metadata={"format": "pt"},
    dialects={"ai-toolkit": "#software=.*ai-toolkit", "lora-down": r".*\.lora_down\.weight$"},
)
