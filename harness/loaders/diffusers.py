"""The live loaders `diffusers` (runtime adapter) and `diffusers-fused`: the pipeline's own LoRA mixin, unmodified.

The mixin runs on a pipeline that has one component, the model under test, so every line between
`pipe.load_lora_weights(file)` and the model is the shipped one, without a VAE or text encoder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.protocol import loader
from harness.loaders.quiet import quiet

if TYPE_CHECKING:
    import torch

# model class -> (mixin of its pipeline, the pipeline's name for the model)
PIPELINE_MIXINS = {
    "QwenImageTransformer2DModel": ("QwenImageLoraLoaderMixin", "transformer"),
    "FluxTransformer2DModel": ("FluxLoraLoaderMixin", "transformer"),
    "UNet2DConditionModel": ("StableDiffusionLoraLoaderMixin", "unet"),
}
# It knows DiffSynth files by `.default.` in a key or by an alpha, and passes over bare `.lora_A.weight` keys.
FORMATS = ("diffusers", "kohya", "diffsynth")
NO_MERGED_NAMES = "its kohya converter knows no merged layers (to_qkv, add_qkv_proj)"
UNSUPPORTED: dict[tuple[str, ...], str] = {
    ("kohya", "qwen-image-fused"): NO_MERGED_NAMES,
    ("kohya", "flux"): "its kohya converter knows FLUX by Black Forest Labs' names only",
    ("diffsynth", "sd-unet"): "DiffSynth's names are read for transformers only",
    ("diffsynth", "flux"): "DiffSynth's own FLUX names are not diffusers'",
}
BENCHES = ("qwen-image", "qwen-image-fused", "sd-unet", "flux")
VARIANTS = ("lora", "rslora", "conv")
_LOADED = "_lora_harness_loaded"


def unload(model: torch.nn.Module) -> None:
    """Delete the adapter loaded last; the ones before it keep their strengths."""
    loaded = _loaded(model)
    name, _ = loaded.popitem()
    pipeline = _pipeline(model)
    with quiet("diffusers", "peft"):
        pipeline.delete_adapters(name)
        if loaded:
            pipeline.set_adapters(list(loaded), adapter_weights=list(loaded.values()))
        else:
            pipeline.unload_lora_weights()


def unfuse(model: torch.nn.Module) -> None:
    """Undo the last `load_fused` with `unfuse_lora`, then remove the adapter."""
    pipeline = _pipeline(model)
    with quiet("diffusers", "peft"):
        pipeline.unfuse_lora(components=[_component(model)])
        pipeline.unload_lora_weights()


@loader(
    formats=FORMATS,
    benches=BENCHES,
    variants=VARIANTS,
    unsupported=UNSUPPORTED,
    unload=unload,
    strength_argument="adapter_weights",
)
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Add `lora` as a runtime adapter: `load_lora_weights`, then `set_adapters` with the strength as its weight.

    A second load leaves the first one active, as `set_adapters` with both names does.

    Raises:
        NotImplementedError: no pipeline mixin is known for the class of `model`.
    """
    loaded = _loaded(model)
    name = f"lora_{len(loaded)}"
    pipeline = _pipeline(model)
    with quiet("diffusers", "peft"):
        pipeline.load_lora_weights(str(lora), adapter_name=name)
        weights = {**loaded, name: strength}
        pipeline.set_adapters(list(weights), adapter_weights=list(weights.values()))
    loaded[name] = strength


@loader(
    formats=FORMATS,
    benches=BENCHES,
    variants=VARIANTS,
    unsupported=UNSUPPORTED,
    unload=unfuse,
    strength_argument="lora_scale",
)
def load_fused(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Fuse `lora` into the weights: `load_lora_weights`, then `fuse_lora(lora_scale=strength)`.

    An adapter fused before is baked in first (`unload_lora_weights`), the documented way to fuse several in turn.

    Raises:
        NotImplementedError: no pipeline mixin is known for the class of `model`.
    """
    pipeline = _pipeline(model)
    with quiet("diffusers", "peft"):
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(str(lora), adapter_name="lora")
        pipeline.set_adapters("lora")  # raises when nothing of the file was loaded
        pipeline.fuse_lora(components=[_component(model)], lora_scale=strength)


def _loaded(model: torch.nn.Module) -> dict[str, float]:
    """Adapter name -> strength, in load order; kept on the model because diffusers remembers no weights."""
    if not hasattr(model, _LOADED):
        setattr(model, _LOADED, {})
    loaded: dict[str, float] = getattr(model, _LOADED)
    return loaded


def _component(model: torch.nn.Module) -> str:
    return _mixin(model)[1]


def _mixin(model: torch.nn.Module) -> tuple[str, str]:
    for kind in type(model).__mro__:
        if kind.__name__ in PIPELINE_MIXINS:
            return PIPELINE_MIXINS[kind.__name__]
    raise NotImplementedError(f"no diffusers pipeline is known for {type(model).__name__}")


def _pipeline(model: torch.nn.Module) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file must not become a download
    from diffusers.loaders import lora_pipeline

    mixin, component = _mixin(model)
    kind: type = getattr(lora_pipeline, mixin)
    parts = {name: model if name == component else None for name in kind._lora_loadable_modules}  # type: ignore[attr-defined]
    # What a DiffusionPipeline adds to the mixin as far as LoRA loading asks for it.
    return type("Pipeline", (kind,), {**parts, "components": parts, "hf_device_map": None})()
