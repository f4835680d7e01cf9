"""diffusers up to 0.20: attention processors, `unet.….attn1.processor.to_q_lora.down.weight`, never an alpha.

`to_out_lora` is the layer `to_out.0`. Text encoders stand beside them as `text_encoder.….lora_linear_layer.down.weight`
or, older, `self_attn.to_q_lora.down.weight`, which is the layer `q_proj`.
"""

from __future__ import annotations

from harness.files.format import Format, Naming, Source

_MARK = ".processor."
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")


def _read(stem: str, tail: str) -> str | None:
    if tail not in ("down.weight", "up.weight"):
        return stem
    parent, _, last = stem.rpartition(".")
    layer = last.removesuffix("_lora")
    if layer == last:
        return None
    if parent.endswith(".self_attn"):
        return f"{parent}.{_TEXT[layer]}" if layer in _TEXT else None
    known = "to_out.0" if layer == "to_out" else layer
    return f"{parent[: -len(_MARK) + 1]}.{known}" if f"{parent}.".endswith(_MARK) and known in _LAYERS else None


def _write(name: str) -> str | None:
    parent, _, layer = name.removesuffix(".0").rpartition(".")
    known = "to_out.0" if layer == "to_out" else layer
    return f"{parent}{_MARK}{layer}_lora" if parent and known in _LAYERS and name.endswith(known) else None


def _has_processors(source: Source) -> bool:
    return any(_MARK in key for key in source.file.keys)


FORMAT = Format(
    name="attn-procs",
    example="unet.<module>.processor.to_q_lora.down.weight",
    prefixes={f"{component}.": component for component in ("unet", "text_encoder", "text_encoder_2")},
    pairs=("down", "lora_linear_layer.down"),
    alpha=("none", "tensor"),
    bare="always",
    write_prefix="unet.",
    naming=Naming(_read, _write, "<module>.to_q, to_k, to_v or to_out.0"),
    trait=_has_processors,
)
