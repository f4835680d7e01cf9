"""The live loader `llama-cpp`: llama.cpp's own code, through its Python package, on a GGUF model with a LoRA beside it.

It holds no weights that could be read, so it gives outputs: the logits of every token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.loaders.as_gguf import adapter_file, llama_cpp_loader, model_file
from harness.loaders.live import LiveLoader

if TYPE_CHECKING:
    import torch

_FLOAT32 = 0  # ggml's number of the type: the cache of keys and values is of half precision otherwise


@llama_cpp_loader
def load(base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [1, tokens, vocabulary] of llama.cpp with `lora` at the scale `strength`.

    Raises:
        RuntimeError: llama.cpp does not take the LoRA.
    """
    import torch
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory(prefix="lora-harness-gguf-") as folder:
        engine = Llama(
            str(model_file(base)),
            lora_path=str(adapter_file(lora, Path(folder), base)),
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


LIVE = (LiveLoader("llama-cpp", load, ("llama-cpp-python", "gguf")),)
