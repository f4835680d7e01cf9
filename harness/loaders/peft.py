"""The live loader `peft`: PEFT's own `PeftModel.from_pretrained`, strength, `merge_and_unload`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.protocol import EVERY_BENCH, loader
from harness.loaders.quiet import quiet

if TYPE_CHECKING:
    import torch


VARIANTS = ("lora", "rslora", "conv", "embedding", "dora", "loha", "lokr", "lora-bias")


@loader(formats={"peft"}, benches=EVERY_BENCH, variants=VARIANTS, strength_argument="scale")
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
    """Merge the PEFT folder `lora` into `model` as PEFT users do: W + strength * scaling * B @ A.

    `scaling` is PEFT's own (alpha / rank, alpha / sqrt(rank) for rsLoRA, patterns applied). Returns the merged model.

    Raises:
        FileNotFoundError: `lora` is no folder with `adapter_config.json` and `adapter_model.safetensors`.
    """
    _require_folder(lora)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file must not become a download
    from peft import PeftModel

    with quiet("peft"):
        adapted = PeftModel.from_pretrained(model, str(lora), use_safetensors=True)
        _set_strength(adapted, strength)
        merged: torch.nn.Module = adapted.merge_and_unload()
    return merged


def _require_folder(lora: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (lora / name).is_file():
            raise FileNotFoundError(f"{lora} is no PEFT folder: it has no {name}")


def _set_strength(adapted: torch.nn.Module, strength: float) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        set_scale: Any = getattr(module, "set_scale", None)
        if isinstance(module, BaseTunerLayer) and set_scale is not None:
            set_scale("default", strength)  # relative to the trained scaling; zero and negative values are kept
