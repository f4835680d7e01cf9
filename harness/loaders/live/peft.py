"""The live loaders `peft` (PEFT's own merge) and `peft-runtime` (adapters beside the weights, several at once)."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches import more_benches
from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import held
from harness.loaders.protocol import EVERY_BENCH, OUTPUT_BENCHES

if TYPE_CHECKING:
    import torch

VARIANTS = ("lora", "rslora", "conv", "embedding", "experts", "dora", "loha", "lokr", "lora-bias")
# All of it is right, at 5 s a cell: one bench for each kind of layer is enough of it, the merged `peft` has the rest.
_ELSEWHERE = "left out for its time: PEFT has the same layers for it on clip-text"
_OTHERS = tuple(variant for variant in VARIANTS if variant != "lora")
RUNTIME_UNSUPPORTED: dict[tuple[str, ...], str] = {
    **{(bench, variant): _ELSEWHERE for bench in ("qwen-image", "qwen-image-fused") for variant in _OTHERS},
    **{("sd-unet", variant): _ELSEWHERE for variant in VARIANTS if variant != "conv"},
    ("flux",): _ELSEWHERE,
}
_declared = functools.partial(
    loader,
    formats={"peft"},
    benches=EVERY_BENCH,
    variants=VARIANTS,
    strength_argument="scale",
    also=(*more_benches(), *OUTPUT_BENCHES),
)


@_declared()
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module:
    """Merge the PEFT folder `lora` into `model` as PEFT users do: W + strength * scaling * B @ A.

    `scaling` is PEFT's own (alpha / rank, alpha / sqrt(rank) for rsLoRA, patterns applied). Returns the merged model.

    Raises:
        FileNotFoundError: `lora` is no folder with `adapter_config.json` and `adapter_model.safetensors`.
    """
    with quiet("peft"):
        adapted = _adapted(model, lora, "default")
        _set_scale(adapted, "default", strength)
        merged: torch.nn.Module = adapted.merge_and_unload()
    return merged


def unload(model: torch.nn.Module) -> None:
    """Take the adapter loaded last away; with the last one gone the base model comes back (`PeftModel.unload`)."""
    (adapted,) = held(model)
    names = list(adapted.peft_config)
    if len(names) == 1:
        adapted.unload()
        held(model).clear()
        return
    adapted.delete_adapter(names[-1])
    adapted.base_model.set_adapter(names[:-1])


def set_strength(model: torch.nn.Module, strength: float) -> None:
    """Give the adapter loaded last another strength."""
    (adapted,) = held(model)
    _set_scale(adapted, list(adapted.peft_config)[-1], strength)


@_declared(unsupported=RUNTIME_UNSUPPORTED, unload=unload, set_strength=set_strength)
def load_runtime(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Add the PEFT folder `lora` as one more active adapter; `strength` goes to `set_scale` of its layers.

    The first load makes a `PeftModel` of `model`, which puts the adapters into its layers; a later one adds an adapter
    and activates all of them, as `peft_model.base_model.set_adapter([...])` does for users who combine LoRAs.

    Raises:
        FileNotFoundError: `lora` is no folder with `adapter_config.json` and `adapter_model.safetensors`.
    """
    kept = held(model)
    with quiet("peft"):
        name = f"lora_{len(kept[0].peft_config) if kept else 0}"
        if kept:
            _require_folder(lora)
            kept[0].load_adapter(str(lora), adapter_name=name, use_safetensors=True)
            kept[0].base_model.set_adapter(list(kept[0].peft_config))
        else:
            kept.append(_adapted(model, lora, name))
        _set_scale(kept[0], name, strength)


def _adapted(model: torch.nn.Module, lora: Path, name: str) -> Any:
    _require_folder(lora)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file must not become a download
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(lora), adapter_name=name, use_safetensors=True)


def _require_folder(lora: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (lora / name).is_file():
            raise FileNotFoundError(f"{lora} is no PEFT folder: it has no {name}")


def _set_scale(adapted: torch.nn.Module, name: str, strength: float) -> None:
    """Set what multiplies the trained scaling of the adapter `name`; zero and negative values are kept."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        set_scale: Any = getattr(module, "set_scale", None)
        if isinstance(module, BaseTunerLayer) and set_scale is not None:
            set_scale(name, strength)  # a layer that has no adapter of this name passes over it


LIVE = (
    LiveLoader("peft", load, ("peft",), imports=("peft",), any_model=True),
    LiveLoader("peft-runtime", load_runtime, ("peft",), imports=("peft",), any_model=True),
)
