"""The live loaders `diffusers` (runtime adapter) and `diffusers-fused`: the pipeline's own LoRA mixin, unmodified.

The mixin runs on a pipeline that has one component, the model under test, so every line between
`pipe.load_lora_weights(file)` and the model is the shipped one, without a VAE or text encoder. Beside a text encoder
stands a UNet, which Stable Diffusion's mixin does not load without.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches import more_benches
from harness.benches.table import row_of, rows
from harness.law.reads import every_row, kind_of
from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import family, held

if TYPE_CHECKING:
    import torch

_TEXT = ("StableDiffusionLoraLoaderMixin", "text_encoder")  # the mixin that takes the family `clip`
# It knows DiffSynth files by `.default.` in a key or by an alpha, and passes over bare `.lora_A.weight` keys.
FORMATS = ("diffusers", "kohya", "diffsynth")
NO_MERGED_NAMES = "its kohya converter knows no merged layers (to_qkv, add_qkv_proj)"
UNSUPPORTED: dict[tuple[str, ...], str] = {
    ("kohya", "qwen-image-fused"): NO_MERGED_NAMES,
    ("kohya", "flux", "lora"): "its kohya converter knows FLUX by Black Forest Labs' names only",
    ("kohya", "flux", "qkv-merged"): "its kohya converter asserts that every module of a block is there",
    ("diffusers", "qkv-merged"): "files in its own names have q, k and v apart",
    ("qkv-merged", "qwen-image"): "a merged layer's LoRA matches no layer where q, k and v are apart",
    ("qkv-split", "qwen-image-fused"): "the LoRA of q, k or v matches no layer where they are merged",
    ("diffsynth", "sd-unet"): "DiffSynth's names are read for transformers only",
    ("diffsynth", "flux"): "DiffSynth's own FLUX names are not diffusers'",
    ("kohya", "clip-text"): "what it loads of a text encoder, and how strong, depends on which modules the file has",
    ("diffsynth", "clip-text"): "DiffSynth's names are read for transformers only",
}
# The other models' mixins know few names beside their own: what is drawn for them, as the table of reads spells it.
_DRAWN = {"lora_unet.down.tensor": "kohya", "bare.default.tensor": "diffsynth"}
NO_SUCH_NAMES = "{} keys in the names of this model are none that its mixin knows (docs/reads.md)"
BENCHES = ("qwen-image", "qwen-image-fused", "sd-unet", "flux", "clip-text")
VARIANTS = ("lora", "rslora", "conv", "qkv-split", "qkv-merged")
MORE = tuple(name for name in more_benches() if rows()[name].mixin and rows()[name].component != "transformer_2")


def _unread() -> dict[tuple[str, ...], str]:
    """Return the cells of more benches whose files diffusers was measured to refuse or to load nothing of."""
    measured = [row for row in every_row() if row["tool"] == "diffusers" and row["names"] == "own"]
    return {
        (_DRAWN[row["scheme"]], row["family"]): NO_SUCH_NAMES.format(_DRAWN[row["scheme"]])
        for row in measured
        if row["family"] in MORE and row["scheme"] in _DRAWN and kind_of(row["uniform"]) in ("nothing", "raises")
    }


_declared = functools.partial(
    loader, formats=FORMATS, benches=BENCHES, variants=VARIANTS, unsupported=UNSUPPORTED | _unread(), also=MORE
)


def unload(model: torch.nn.Module) -> None:
    """Delete the adapter loaded last; the ones before it keep their strengths."""
    strengths, pipeline = held(model), _pipeline(model)
    if strengths.pop() is None:
        return
    with quiet("diffusers", "peft", "transformers"):
        pipeline.delete_adapters(f"lora_{len(strengths)}")
        if any(strength is not None for strength in strengths):
            _activate(pipeline, strengths)
        else:
            pipeline.unload_lora_weights()


def set_strength(model: torch.nn.Module, strength: float) -> None:
    """Call `set_adapters` with another weight for the adapter loaded last."""
    if held(model)[-1] is not None:
        held(model)[-1] = strength
        _activate(_pipeline(model), held(model))


def unfuse(model: torch.nn.Module) -> None:
    """Undo the last `load_fused` with `unfuse_lora`, then remove the adapter."""
    pipeline = _pipeline(model)
    with quiet("diffusers", "peft", "transformers"):
        pipeline.unfuse_lora(components=[_mixin(model)[1]])
        pipeline.unload_lora_weights()


@_declared(unload=unload, set_strength=set_strength, strength_argument="adapter_weights")
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Add `lora` as a runtime adapter: `load_lora_weights`, then `set_adapters` with the strength as its weight.

    A second load leaves the first one active, as `set_adapters` with both names does. Where `load_lora_weights` takes
    nothing of the file it makes no adapter and returns: `set_adapters` would then only say that there is none.

    Raises:
        NotImplementedError: no pipeline mixin is known for the class of `model`.
    """
    strengths, pipeline = held(model), _pipeline(model)
    with quiet("diffusers", "peft", "transformers"):
        is_there = _load(pipeline, lora, f"lora_{len(strengths)}")
        strengths.append(strength if is_there else None)
        if is_there:
            _activate(pipeline, strengths)


@_declared(unload=unfuse, strength_argument="lora_scale")
def load_fused(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Fuse `lora` into the weights: `load_lora_weights`, then `fuse_lora(lora_scale=strength)`.

    An adapter fused before is baked in first (`unload_lora_weights`), the documented way to fuse several in turn.

    Raises:
        NotImplementedError: no pipeline mixin is known for the class of `model`.
    """
    pipeline = _pipeline(model)
    with quiet("diffusers", "peft", "transformers"):
        pipeline.unload_lora_weights()
        if not _load(pipeline, lora, "lora"):
            return
        pipeline.set_adapters("lora")
        pipeline.fuse_lora(components=[_mixin(model)[1]], lora_scale=strength)


def _load(pipeline: Any, lora: Path, name: str) -> bool:
    """Load the file, and tell whether there is an adapter of it now."""
    # Up to 0.34 the name of the file has to be given too where no hub may be asked.
    pipeline.load_lora_weights(str(lora), weight_name=lora.name if lora.is_file() else None, adapter_name=name)
    return any(name in names for names in pipeline.get_list_adapters().values())


def _activate(pipeline: Any, strengths: list[float | None]) -> None:
    """Make every adapter loaded active at its strength; these are kept because diffusers remembers no weights."""
    there = {f"lora_{number}": strength for number, strength in enumerate(strengths) if strength is not None}
    pipeline.set_adapters(list(there), adapter_weights=list(there.values()))


def _mixin(model: torch.nn.Module) -> tuple[str, str]:
    if family(model) == "clip":
        return _TEXT
    row = row_of(model)
    if row is None:
        raise NotImplementedError(f"no diffusers pipeline is known for {type(model).__name__}")
    return str(row.mixin), row.component


def _pipeline(model: torch.nn.Module) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file must not become a download
    from diffusers.loaders import lora_pipeline

    mixin, component = _mixin(model)
    kind: type = getattr(lora_pipeline, mixin)
    parts: dict[str, object] = dict.fromkeys(kind._lora_loadable_modules)  # type: ignore[attr-defined]
    if component == "text_encoder":
        parts["unet"] = _bystander()
    parts[component] = model
    # What a DiffusionPipeline adds to the mixin as far as LoRA loading asks for it.
    return type("Pipeline", (kind,), {**parts, "components": parts, "hf_device_map": None})()


@functools.cache
def _bystander() -> torch.nn.Module:
    """Return a UNet that no key of a text encoder's file is meant for."""
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    widths = {"block_out_channels": (2,), "norm_num_groups": 1, "cross_attention_dim": 2, "attention_head_dim": 1}
    unet: torch.nn.Module = UNet2DConditionModel(sample_size=2, layers_per_block=1, **blocks, **widths)
    return unet


_NEEDS = ("diffusers", "peft")
_IMPORTS = ("diffusers.loaders", "peft")
LIVE = (
    LiveLoader("diffusers", load, _NEEDS, imports=_IMPORTS),
    LiveLoader("diffusers-fused", load_fused, _NEEDS, imports=_IMPORTS),
)
