"""The live loader `peft-runtime`: PEFT's adapters left beside the weights, several of them active together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.peft import _require_folder
from harness.loaders.protocol import loader
from harness.loaders.quiet import quiet

if TYPE_CHECKING:
    import torch

_PREFIX = "lora_"


def unload(model: torch.nn.Module) -> torch.nn.Module:
    """Take the adapter loaded last away; with the last one gone the base model comes back (`PeftModel.unload`)."""
    adapted: Any = model
    names = list(adapted.peft_config)
    if len(names) == 1:
        base: torch.nn.Module = adapted.unload()
        return base
    adapted.delete_adapter(names[-1])
    adapted.base_model.set_adapter(names[:-1])
    return model


@loader(formats={"peft"}, unload=unload, strength_argument="scale")
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
    """Add the PEFT folder `lora` as one more active adapter; `strength` goes to `set_scale` of its layers.

    The first load wraps `model` in a `PeftModel`; a later one adds an adapter to it and activates all of them, as
    `model.base_model.set_adapter([...])` does for users who combine LoRAs.

    Raises:
        FileNotFoundError: `lora` is no folder with `adapter_config.json` and `adapter_model.safetensors`.
    """
    _require_folder(lora)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file must not become a download
    from peft import PeftModel

    with quiet("peft"):
        if not isinstance(model, PeftModel):
            name = f"{_PREFIX}0"
            model = PeftModel.from_pretrained(model, str(lora), adapter_name=name, use_safetensors=True)
        else:
            name = f"{_PREFIX}{len(model.peft_config)}"
            model.load_adapter(str(lora), adapter_name=name, use_safetensors=True)
            model.base_model.set_adapter(list(model.peft_config))
        _set_strength(model, name, strength)
    return model


def _set_strength(adapted: torch.nn.Module, name: str, strength: float) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        set_scale: Any = getattr(module, "set_scale", None)
        if isinstance(module, BaseTunerLayer) and set_scale is not None:
            set_scale(name, strength)  # a layer that has no adapter of this name passes over it
