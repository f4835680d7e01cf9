"""The live loader `comfyui`: ComfyUI's key matching, weight adapters and model patcher, from a checkout.

Set `LORA_HARNESS_COMFYUI` to the folder of ComfyUI. Its files run unmodified, as with `--cpu` where there is no GPU.
ComfyUI builds its own model classes; here the layers of the model under test, under ComfyUI's names for them, take the
place of `diffusion_model` in an otherwise empty object of the class that ComfyUI has for the family, because aliases
depend on it; a text encoder stands where ComfyUI keeps CLIP-L.
What is written here around the shipped functions are the lines of `comfy.sd.load_lora_for_models` (key map, convert,
load, patch a clone) and of `LoraLoader.load_lora` in `nodes.py` (read the file), and the call of `patch_model`, which
ComfyUI makes before it samples.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from harness.loaders.checkouts import Checkout
from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import family, flux_config, held, put, renamed, unet_config

if TYPE_CHECKING:
    import torch

CHECKOUT = Checkout(
    "comfyui",
    "LORA_HARNESS_COMFYUI",
    "comfy/lora.py",
    "https://github.com/comfyanonymous/ComfyUI",
    absent=("torchvision", "torchsde", "torchaudio"),
)
FORMATS = ("kohya", "comfyui", "diffusers", "diffsynth", "attn-procs")
BENCHES = ("qwen-image", "qwen-image-fused", "sd-unet", "flux", "clip-text")
VARIANTS = ("lora", "rslora", "conv", "tucker", "dora", "loha", "lokr", "full", "qkv-split", "qkv-merged")
_OWN = "ComfyUI's own names are those of the original checkpoint"
_BARE = "names without a prefix are matched for Qwen-Image only"
_FLUX_OWN = ("lora", "dora", "loha", "lokr", "full")
UNSUPPORTED: dict[tuple[str, ...], str] = {
    ("qkv-split", "qwen-image-fused"): "it has no alias of q, k and v in a merged layer of Qwen-Image",
    ("qkv-merged", "qwen-image"): "it has no alias of merged layers where q, k and v are apart",
    ("comfyui", "sd-unet"): _OWN,
    ("comfyui", "clip-text"): _OWN,
    **{(form, "flux", variant): _OWN for form in ("kohya", "comfyui") for variant in _FLUX_OWN},
    ("diffusers", "flux", "qkv-merged"): "diffusers writes FLUX with q, k and v apart",
    **{("diffsynth", bench): _BARE for bench in ("sd-unet", "flux", "clip-text")},
    **{("attn-procs", bench): "diffusers had attention processors in UNets" for bench in BENCHES if bench != "sd-unet"},
}


def unload(model: torch.nn.Module) -> None:
    """Undo the last load: unpatch, then patch again with the model patcher that was there before it."""
    patchers = held(model)
    patchers.pop().unpatch_model()
    if len(patchers) > 1:
        patchers[-1].patch_model()


@loader(
    formats=FORMATS,
    benches=BENCHES,
    variants=VARIANTS,
    unsupported=UNSUPPORTED,
    unload=unload,
    strength_argument="strength_model",
)
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Patch `model` with the file `lora` as the node `Load LoRA` does; a second load is one more node in a row.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    shipped()
    with quiet(""):
        patchers = _patchers(model)
        patched = _load_lora(patchers[-1], lora, strength)
        if len(patchers) > 1:
            patchers[-1].unpatch_model()
        patched.patch_model()
        patchers.append(patched)


def _load_lora(patcher: Any, lora: Path, strength: float) -> Any:
    comfy = shipped()
    is_clip = hasattr(patcher.model, "clip_l")
    keys_of = comfy.lora.model_lora_keys_clip if is_clip else comfy.lora.model_lora_keys_unet
    key_map = keys_of(patcher.model, {})
    tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(lora), safe_load=True))
    loaded = comfy.lora.load_lora(tensors, key_map)
    patched = patcher.clone()
    patched.add_patches(loaded, strength)
    return patched


def _patchers(model: torch.nn.Module) -> list[Any]:
    """Return the model patchers of `model`, the plain one first, one more for each load."""
    import torch

    patchers, cpu = held(model), torch.device("cpu")
    if not patchers:
        # in place, so that rows of a merged layer stay views of it
        patcher = shipped().model_patcher.ModelPatcher
        patchers.append(patcher(_as_comfyui(model), cpu, cpu, weight_inplace_update=True))
    return patchers


def _as_comfyui(model: torch.nn.Module) -> torch.nn.Module:
    """Return `model` as ComfyUI has it; what it is none of keeps its own names."""
    import torch

    utils, kind = shipped().utils, family(model)
    if kind == "clip":
        clip = torch.nn.Module()
        put(clip, "clip_l.transformer", model)
        return clip
    if kind == "unet":
        config = unet_config(model)
        return _base_model("BaseModel", renamed(model, utils.unet_to_diffusers(config)), config)
    if kind == "flux":
        config = flux_config(model)
        return _base_model("Flux", renamed(model, utils.flux_to_diffusers(config)), config)
    return _base_model("QwenImage" if kind == "qwen-image" else "BaseModel", model, {})


def _base_model(name: str, diffusion_model: torch.nn.Module, config: dict[str, Any]) -> torch.nn.Module:
    import torch

    kind = getattr(shipped().model_base, name)
    base: torch.nn.Module = kind.__new__(kind)
    torch.nn.Module.__init__(base)  # BaseModel's own would build a second, full-sized transformer
    base.diffusion_model = diffusion_model
    base.model_config = SimpleNamespace(unet_config=config)  # type: ignore[assignment]
    return base


@functools.cache
def shipped() -> ModuleType:
    """Return the shipped package `comfy` with the modules used here.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    import torch

    with quiet(""):
        (arguments,) = CHECKOUT.modules("comfy.cli_args")
        if not torch.cuda.is_available():
            arguments.args.cpu = True  # the command line option --cpu; model_management reads it when it is imported
        names = ("lora", "lora_convert", "model_base", "model_patcher", "utils")
        CHECKOUT.modules(*(f"comfy.{name}" for name in names))
    (comfy,) = CHECKOUT.modules("comfy")
    return comfy


LIVE = (LiveLoader("comfyui", load, ("einops", "scipy", "psutil"), checkout=CHECKOUT, shipped=shipped),)
