"""A model of transformers and a PEFT folder as GGUF files, as llama.cpp's own scripts write them.

A Llama as `convert_hf_to_gguf.py` has it, the rows of q and k in its order; a LoRA as `convert_lora_to_gguf.py` has it:
one alpha, that of `lora_alpha`, and A and B as they are, under llama.cpp's names.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.protocol import loader

if TYPE_CHECKING:
    from torch import Tensor

llama_cpp_loader = loader(
    formats={"peft", "gguf"},
    benches={"tiny-llama"},
    strength_argument="scale",
    modules=r"\.(?:v|o|gate|up|down)_proj$",  # rows of q and k stand in another order in GGUF
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

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    path = base / "model.gguf"
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, value in load_file(base / "model.safetensors").items():
        turned = {"q_proj": heads, "k_proj": groups}.get(name.split(".")[-2])
        writer.add_tensor(_named(name), (_in_pairs(value, turned) if turned else value).numpy())
    _write(writer)
    return path


def adapter_file(lora: Path, folder: Path) -> Path:
    """Write `lora`, a PEFT folder or a GGUF file with the names of transformers, into `folder` under llama.cpp's."""
    import gguf

    alpha, tensors = _of_peft(lora) if lora.is_dir() else _of_gguf(lora)
    writer = gguf.GGUFWriter(str(folder / "lora.gguf"), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer, part, value in tensors:
        writer.add_tensor(f"{_named(layer)}.lora_{part}", value)
    _write(writer)
    return folder / "lora.gguf"


def _of_peft(lora: Path) -> tuple[float | None, list[tuple[str, str, Any]]]:
    """Return alpha and, for each tensor, its layer, `a` or `b`, and its numbers."""
    from safetensors.torch import load_file

    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    parts = {
        key.removeprefix("base_model.model.").partition(".lora_"): value.float().numpy()
        for key, value in load_file(lora / "adapter_model.safetensors").items()
    }
    return float(config["lora_alpha"]), [(name, rest[0].lower(), value) for (name, _, rest), value in parts.items()]


def _of_gguf(lora: Path) -> tuple[float | None, list[tuple[str, str, Any]]]:
    import gguf

    file = gguf.GGUFReader(lora)
    said = file.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    split = ((tensor.name.rpartition(".lora_"), tensor.data) for tensor in file.tensors)
    return said and float(said.parts[said.data[0]][0]), [(name, part, value) for (name, _, part), value in split]


def _named(name: str) -> str:
    layer = name.removesuffix(".weight")
    block = _BLOCK.fullmatch(layer)
    return f"blk.{block[1]}.{_NAMES[block[2]]}.weight" if block else f"{_OUTER[layer]}.weight"


def _in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of q or k in llama.cpp's order: the two of each rotation beside each other."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
