"""XLabs FLUX: attention processors of the original model, `<block>.processor.qkv_lora1.down.weight`, never an alpha.

1 is the image stream, 2 the text stream. In single blocks `qkv_lora` changes the rows of q, k, v, which are the first
of `linear1`, so its B has fewer rows than the layer. USO saves the same keys.
"""

from __future__ import annotations

import re

from harness.files.format import Format, Naming

_LAYERS = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1",
    "proj_lora": "linear2",
}
_KEYS = {layer: key for key, layer in _LAYERS.items()}
_READ = re.compile(r"(double|single)_blocks\.(\d+)\.processor\.(\w+)")
_WRITE = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def _read(stem: str, tail: str) -> str | None:
    found = _READ.fullmatch(stem)
    layer = _LAYERS.get(found[3], "") if found else ""
    return f"{found[1]}_blocks.{found[2]}.{layer}" if found and _belongs(found[1], layer) else None


def _write(name: str) -> str | None:
    found = _WRITE.fullmatch(name)
    if not found or found[3] not in _KEYS or not _belongs(found[1], found[3]):
        return None
    return f"{found[1]}_blocks.{found[2]}.processor.{_KEYS[found[3]]}"


def _belongs(kind: str, layer: str) -> bool:
    return bool(layer) and (kind == "double") == ("_attn." in layer)


FORMAT = Format(
    name="xlabs",
    example="double_blocks.<n>.processor.qkv_lora1.down.weight",
    prefixes={"diffusion_model.": ""},
    pairs=("down",),
    alpha=("none", "tensor"),
    bare="always",
    naming=Naming(_read, _write, "double_blocks.<n>.img_attn.qkv or single_blocks.<n>.linear1"),
)
