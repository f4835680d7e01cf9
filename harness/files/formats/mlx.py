"""mlx-lm: a folder with `adapters.safetensors` and `adapter_config.json`, which holds one factor for all modules.

The halves are stored transposed: lora_a [in, r], lora_b [r, out] (experts: [e, r, in] and [e, out, r], not transposed).
There is no alpha; `lora_parameters.scale` is the whole factor on B @ A, read here as alpha = scale * rank.
"""

from __future__ import annotations

from harness.files.format import MLX_WEIGHTS_NAME, Format

FORMAT = Format(
    name="mlx",
    example="<module>.lora_a beside adapter_config.json with lora_parameters",
    prefixes={},
    pairs=("lora_a",),
    alpha=("scale",),
    bare="always",
    folder=True,
    metadata={"format": "mlx"},
    extras={"m": "magnitude"},
    flips=lambda name: ("A", "B"),
    weights_name=MLX_WEIGHTS_NAME,
)
