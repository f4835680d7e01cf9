"""The live loaders `invokeai` (patched weights) and `invokeai-sidecar`: InvokeAI's shipped LoRA code, unmodified.

The wheel is unpacked without its dependencies (`lora-harness install invokeai==6.14.2`). Its converters,
layer classes, `LayerPatcher` and sidecar layers run as they are; services of the application that they import, a
logger, a lock and the name of the CPU, stand in as a few lines below. What is written here around the shipped
functions are the lines of `LoRALoader._load_model` (read the file, normalise PEFT keys, convert by model family) and
of the denoising nodes, which hold `LayerPatcher.apply_smart_model_patches` open while they sample: here until `unload`.
InvokeAI patches weights on a GPU and adds sidecars to layers on the CPU; `force_direct_patching` chooses the former.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import family, held
from harness.loaders.releases import Package, Release

if TYPE_CHECKING:
    import torch

PACKAGE = Package("invokeai", tested=("6.14.2",))
FORMATS = ("kohya", "diffusers", "diffsynth")
BENCHES = ("qwen-image", "qwen-image-fused", "sd-unet", "clip-text")
VARIANTS = ("lora", "rslora", "conv", "tucker", "dora", "loha", "lokr", "full")
_KOHYA_ONLY = "it reads Stable Diffusion files with kohya's keys only"
UNSUPPORTED: dict[tuple[str, ...], str] = {
    ("kohya", "qwen-image-fused"): "its kohya converter knows no merged layers (to_qkv, add_qkv_proj)",
    **{(form, bench): _KOHYA_ONLY for form in ("diffusers", "diffsynth") for bench in ("sd-unet", "clip-text")},
    ("dora", "sd-unet"): "one magnitude per output is taken for one per input, as it is on the other benches",
}
PACKAGES = ("", ".app", ".backend", ".backend.util", ".backend.model_manager", ".backend.model_manager.load")
_CACHE = "invokeai.backend.model_manager.load.model_cache"
_CONVERSIONS = "invokeai.backend.patches.lora_conversions"
_TEXT_PREFIXES = ("lora_te1_", "lora_te2_", "lora_te_")
_declared = functools.partial(
    loader, formats=FORMATS, benches=BENCHES, variants=VARIANTS, unsupported=UNSUPPORTED, strength_argument="weight"
)


def unload(model: torch.nn.Module) -> None:
    """Leave the block that the last load entered: it restores the weights, or clears the sidecars."""
    held(model).pop().close()


@_declared(unload=unload)
def load(model: torch.nn.Module, lora: Path, *, release: Release, strength: float = 1.0) -> None:
    """Add the LoRA to the weights of `model`, as InvokeAI does for layers on a GPU.

    Raises:
        NotImplementedError: the shipped code has no converter for the class of `model`.
    """
    _patch(release, model, lora, strength, force_direct_patching=True)


@_declared()
def load_sidecar(model: torch.nn.Module, lora: Path, *, release: Release, strength: float = 1.0) -> None:
    """Compute the LoRA beside the layers of `model`, as InvokeAI does for quantised layers and layers on the CPU.

    Raises:
        NotImplementedError: the shipped code has no converter for the class of `model`.
    """
    _, autocast = shipped(release)
    if not held(model):
        autocast.apply_custom_layers_to_model(model)  # its model cache does so when a model is loaded
    _patch(release, model, lora, strength, force_sidecar_patching=True)


def _patch(release: Release, model: torch.nn.Module, lora: Path, strength: float, **how: bool) -> None:
    layer_patcher, _ = shipped(release)
    dtype = next(model.parameters()).dtype
    with quiet(""):
        patch, prefix = _convert(model, lora)
        patch.to(dtype=dtype)
        opened = contextlib.ExitStack()
        opened.enter_context(
            layer_patcher.LayerPatcher.apply_smart_model_patches(model, [(patch, strength)], prefix, dtype, **how)
        )
    held(model).append(opened)


def _convert(model: torch.nn.Module, lora: Path) -> tuple[Any, str]:
    """Return the patch that the shipped converter makes of the file, and the prefix of the layers meant for `model`."""
    from safetensors.torch import load_file

    adapters = importlib.import_module(f"{_CONVERSIONS}.peft_adapter_utils")
    tensors = adapters.normalize_peft_adapter_names(load_file(str(lora)))
    kind = family(model)
    if kind == "qwen-image":
        qwen = importlib.import_module(f"{_CONVERSIONS}.qwen_image_lora_conversion_utils")
        prefix = qwen.QWEN_IMAGE_EDIT_LORA_TRANSFORMER_PREFIX
        return qwen.lora_model_from_qwen_image_state_dict(state_dict=tensors, alpha=None), prefix
    sd = importlib.import_module(f"{_CONVERSIONS}.sd_lora_conversion_utils")
    if kind == "unet":
        return sd.lora_model_from_sd_state_dict(state_dict=tensors), "lora_unet_"
    if kind == "clip":
        first = next(iter(tensors), "")
        prefix = next(filter(first.startswith, _TEXT_PREFIXES), "lora_te_")
        return sd.lora_model_from_sd_state_dict(state_dict=tensors), prefix
    raise NotImplementedError(f"InvokeAI has no diffusers model and LoRA converter for {type(model).__name__}")


@functools.cache
def shipped(release: Release) -> tuple[Any, Any]:
    """Return the shipped modules with `LayerPatcher` and with `apply_custom_layers_to_model`.

    They import each other by their full names, so a process can have one release of them.
    """
    release.hollow((*PACKAGES, _CACHE.removeprefix("invokeai")))
    for name, values in _services().items():
        sys.modules.setdefault(name, _module(name, values))
    patcher = importlib.import_module("invokeai.backend.patches.layer_patcher")
    return patcher, importlib.import_module(f"{_CACHE}.torch_module_autocast.torch_module_autocast")


def _services() -> dict[str, dict[str, object]]:
    """Return what stands in for the application's logger, device choice and model lock, by module."""
    import torch

    def logger(name: str | None = None) -> logging.Logger:
        return logging.getLogger(name or "InvokeAI")

    loggers: dict[str, Callable[..., object]] = {"get_logger": logger}
    log = SimpleNamespace(**loggers)
    lock = SimpleNamespace(read_lock=contextlib.nullcontext)
    sys.modules["invokeai.backend.util"].InvokeAILogger = log  # type: ignore[attr-defined]
    return {
        "invokeai.backend.util.logging": {"InvokeAILogger": log, "warning": logger().warning},
        "invokeai.backend.util.devices": {"TorchDevice": SimpleNamespace(CPU_DEVICE=torch.device("cpu"))},
        f"{_CACHE}.model_cache": {"MODEL_LOAD_LOCK": lock},
    }


def _module(name: str, values: dict[str, object]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(values)
    return module


LIVE = (
    LiveLoader("invokeai", load, ("einops",), package=PACKAGE),
    LiveLoader("invokeai-sidecar", load_sidecar, ("einops",), package=PACKAGE),
)
