"""The live loader `xllamacpp`: llama.cpp in a wheel of its own, a server inside Python, on a GGUF model with a LoRA.

It holds no weights that could be read, so it gives outputs. Its server gives the last hidden states of every token
(`/embedding`, without pooling); the logits are those times the output layer, which no LoRA of these files changes.
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.as_gguf import adapter_file, llama_cpp_loader, model_file
from harness.loaders.live import LiveLoader

if TYPE_CHECKING:
    import torch

_TOKENS = 64


@llama_cpp_loader
def load(base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [1, tokens, vocabulary] of llama.cpp with `lora` at the scale `strength`.

    Raises:
        RuntimeError: llama.cpp does not take the LoRA.
    """
    import torch
    import xllamacpp
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="lora-harness-gguf-") as folder:
        adapter = adapter_file(lora, Path(folder), base)
        server = xllamacpp.Server(_parameters(xllamacpp, model_file(base), adapter, strength))
        hidden = _hidden(server.listening_address, inputs["input_ids"][0].tolist())
        del server
    return (torch.tensor(hidden) @ load_file(base / "model.safetensors")["lm_head.weight"].float().T)[None]


def _parameters(shipped: Any, model: Path, adapter: Path, scale: float) -> Any:
    """Return the server's parameters: one LoRA, hidden states of every token, all in float32."""
    said = shipped.CommonParams()
    said.model.path = str(model)
    said.lora_adapters = [shipped.CommonAdapterLoraInfo(str(adapter), scale)]
    said.n_ctx = said.n_batch = said.n_ubatch = _TOKENS
    said.n_parallel = said.cpuparams.n_threads = said.cpuparams_batch.n_threads = 1
    said.embedding, said.warmup, said.fit_params = True, False, False
    said.pooling_type = shipped.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    said.flash_attn_type = shipped.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    said.cache_type_k = said.cache_type_v = shipped.ggml_type.GGML_TYPE_F32
    return said


def _hidden(address: str, tokens: list[int]) -> list[list[float]]:
    """Ask for the last hidden states of `tokens`, as they are."""
    body = json.dumps({"content": tokens, "embd_normalize": -1}).encode()
    asked = urllib.request.Request(f"{address}/embedding", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        states: list[list[float]] = json.load(answer)[0]["embedding"]
    return states


LIVE = (LiveLoader("xllamacpp", load, ("xllamacpp", "gguf"), imports=("xllamacpp",)),)
