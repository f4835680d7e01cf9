"""A model of transformers and a PEFT folder as GGUF files, as llama.cpp's own scripts write them.

A Llama as `convert_hf_to_gguf.py` has it, a LoRA as `convert_lora_to_gguf.py` has it: one alpha, that of `lora_alpha`,
and A and B as they are, under llama.cpp's names; the rows of q and k, and of their B, in its order.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.declaration import loader

if TYPE_CHECKING:
    from torch import Tensor

llama_cpp_loader = loader(
    formats={"peft", "gguf"},
    benches={"tiny-llama"},
    strength_argument="scale",
    outputs=True,
)
"""What llama.cpp can do with such files, by whichever package."""

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


@cache
def model_file(base: Path) -> Path:
    """Return the model in the folder `base` as a GGUF file beside it."""
    import gguf
    from safetensors.torch import load_file

    config, path = _config(base), base / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, value in load_file(base / "model.safetensors").items():
        writer.add_tensor(_named(name), _ordered(name, value, config).numpy())
    _write(writer)
    return path


def adapter_file(lora: Path, folder: Path, base: Path) -> Path:
    """Write `lora`, a PEFT folder or a GGUF file with transformers' names, into `folder` as llama.cpp has it.

    `base` is the folder of the model, whose configuration says how many heads q and k have.
    """
    import gguf

    alpha, tensors = _of_peft(lora) if lora.is_dir() else _of_gguf(lora)
    writer = gguf.GGUFWriter(str(folder / "lora.gguf"), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    config = _config(base)
    for layer, part, value in tensors:
        ordered = _ordered(layer, value, config) if part == "b" else value
        writer.add_tensor(f"{_named(layer)}.lora_{part}", ordered.contiguous().numpy())
    _write(writer)
    return folder / "lora.gguf"


def _of_peft(lora: Path) -> tuple[float | None, list[tuple[str, str, Tensor]]]:
    """Return alpha and, for each tensor, its layer, `a` or `b`, and its numbers."""
    from safetensors.torch import load_file

    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    parts = {
        key.removeprefix("base_model.model.").partition(".lora_"): value.float()
        for key, value in load_file(lora / "adapter_model.safetensors").items()
    }
    return float(config["lora_alpha"]), [(name, rest[0].lower(), value) for (name, _, rest), value in parts.items()]


def _of_gguf(lora: Path) -> tuple[float | None, list[tuple[str, str, Tensor]]]:
    import gguf
    import torch

    file = gguf.GGUFReader(lora)
    said = file.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    split = ((tensor.name.rpartition(".lora_"), torch.tensor(tensor.data)) for tensor in file.tensors)
    return said and float(said.parts[said.data[0]][0]), [(name, part, value) for (name, _, part), value in split]


def _named(name: str) -> str:
    layer = name.removesuffix(".weight")
    block = _BLOCK.fullmatch(layer)
    return f"blk.{block[1]}.{_NAMES[block[2]]}.weight" if block else f"{_OUTER[layer]}.weight"


def _config(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return found


def _ordered(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """Return the rows of q or k in llama.cpp's order, the two of each rotation side by side; others as they are."""
    key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(
        name.removesuffix(".weight").rpartition(".")[2]
    )
    if key is None:
        return weight
    halves = weight.reshape(config[key], 2, weight.shape[0] // config[key] // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
