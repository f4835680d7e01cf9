"""The live loader `llama-cpp`: llama.cpp's own code, through its Python package, on a GGUF model with a LoRA beside it.

It holds no weights that could be read, so it gives outputs: the logits of every token. The model is written as GGUF
here, as llama.cpp's `convert_hf_to_gguf.py` writes it; a PEFT folder is too, as `convert_lora_to_gguf.py` does: one
alpha, that of `lora_alpha`, and A and B as they are. A GGUF LoRA goes to llama.cpp as it stands.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.live import LiveLoader
from harness.loaders.protocol import loader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
_FLOAT32 = 0  # ggml's number of the type: the cache of keys and values is of half precision otherwise


@loader(
    formats={"peft", "gguf"},
    benches={"tiny-llama"},
    strength_argument="scale",
    modules=r"\.(?:v|o|gate|up|down)_proj$",  # rows of q and k stand in another order in GGUF
    outputs=True,
)
def load(base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [1, tokens, vocabulary] of llama.cpp with `lora` at the scale `strength`.

    Raises:
        RuntimeError: llama.cpp does not take the LoRA.
    """
    import torch
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory(prefix="lora-harness-gguf-") as folder:
        adapter = _adapter(lora, Path(folder) / "lora.gguf") if lora.is_dir() else lora
        engine = Llama(
            str(_model(base)),
            lora_path=str(adapter),
            lora_scale=strength,
            n_ctx=64,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=_FLOAT32,
            type_v=_FLOAT32,
            verbose=False,
        )
        try:
            tokens = inputs["input_ids"][0].tolist()
            engine.eval(tokens)
            return torch.from_numpy(engine.scores[: len(tokens)].copy())[None]
        finally:
            engine.close()


@cache
def _model(base: Path) -> Path:
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


def _adapter(folder: Path, path: Path) -> Path:
    """Write a PEFT folder as a GGUF LoRA, at `path`."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        writer.add_tensor(f"{_named(f'{name}.weight')}.lora_{part[0].lower()}", value.float().numpy())
    _write(writer)
    return path


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


LIVE = (LiveLoader("llama-cpp", load, ("llama-cpp-python", "gguf")),)
