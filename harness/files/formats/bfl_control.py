"""Black Forest Labs' control LoRAs (FLUX tools): bare names of the original model, never an alpha.

Unlike other bare files they train biases (`….lora_B.bias`) and replace whole tensors: the scales of the q and k norms
(`….query_norm.scale`). `img_in` is wider than the base's, which a reader has to pad with zeros.
"""

from __future__ import annotations

import re

from harness.files.format import Format, Source

_NORM = re.compile(r"(double|single)_blocks\.\d+\.(\w+\.)*(query|key)_norm\.scale$")
_BIAS = re.compile(r"(double_blocks|single_blocks|\w+_in|final_layer)(\.\w+)*\.lora_B\.bias$")
_ENDS = ("_norm.scale", ".lora_B.bias")


def _is_control(source: Source) -> bool:
    able = [key for key in source.file.keys if key.endswith(_ENDS)]
    return any(_NORM.match(key) or _BIAS.match(key) for key in able)


FORMAT = Format(
    name="bfl-control",
    example="double_blocks.<n>.img_attn.qkv.lora_A.weight with ….lora_B.bias and ….query_norm.scale",
    prefixes={},
    pairs=("lora_A",),
    alpha=("none", "tensor"),
    bare="always",
    extras={"query_norm.scale": "query_norm", "key_norm.scale": "key_norm"},
    trait=_is_control,
)
