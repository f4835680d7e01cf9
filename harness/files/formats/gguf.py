"""llama.cpp's GGUF adapter: `blk.0.attn_q.weight.lora_a`, one alpha for the file under `adapter.lora.alpha`.

Without alpha, or with alpha 0, llama.cpp takes scale 1. The token embedding's A is stored transposed, [tokens, r].
"""

from __future__ import annotations

from harness.files.format import Format, Source
from harness.files.gguf_file import GgufFile


def _is_gguf(source: Source) -> bool:
    return isinstance(source.file, GgufFile)


FORMAT = Format(
    name="gguf",
    example="<tensor>.weight.lora_a in a GGUF file with adapter.lora.alpha",
    prefixes={},
    pairs=("weight.lora_a",),
    alpha=("kv",),
    bare="always",
    trait=_is_gguf,
    flips=lambda name: ("A",) if name == "token_embd" else (),
    suffix=".gguf",
)
