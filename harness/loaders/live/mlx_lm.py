"""The live loader `mlx-lm`: mlx-lm's own `load_model` and `load_adapters`, on a CPU or on Apple's GPU.

It builds a model of mlx, whose weights are not torch's, so it gives outputs: the logits of every token. It has no
strength: the scale of the file is all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet

if TYPE_CHECKING:
    import torch


@loader(formats={"mlx"}, benches={"tiny-llama"}, variants={"lora"}, strength_argument=None, outputs=True)
def load(base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [1, tokens, vocabulary] of mlx-lm with the adapter in the folder `lora`.

    Raises:
        ValueError: the adapter has a tensor that the model has no place for.
    """
    import mlx.core as mx
    import torch
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    with quiet(""):
        model, _ = load_model(base)
        model = load_adapters(model, str(lora))
        model.eval()
        logits = model(mx.array(inputs["input_ids"].numpy())).astype(mx.float32)
    return torch.tensor(logits.tolist())


LIVE = (LiveLoader("mlx-lm", load, ("mlx-lm",), imports=("mlx_lm",)),)
