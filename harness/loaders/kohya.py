"""What kohya's programs share: the function that merges a LoRA while it reads a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def merge_while_reading(lora_utils: Any, model: torch.nn.Module, lora: Path, multiplier: float) -> None:
    """Save the weights of `model`, have the program's own `lora_utils` read them with `lora` merged, and load them."""
    from safetensors.torch import load_file, save_file

    base = next(model.parameters())
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        checkpoint = f"{folder}/model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, checkpoint)
        merged = lora_utils.load_safetensors_with_lora_and_fp8(
            checkpoint,
            [load_file(str(lora))],
            [multiplier],
            fp8_optimization=False,
            calc_device=base.device,
            dit_weight_dtype=base.dtype,
        )
    model.load_state_dict(merged, strict=True)
