"""The live loader `comfyui`: ComfyUI's key matching, weight adapters and model patcher, from a checkout.

Set `LORA_HARNESS_COMFYUI` to the folder of ComfyUI. Its files run unmodified, as with `--cpu` where there is no GPU.
ComfyUI builds its own model classes; here the model under test takes the place of `diffusion_model` in an otherwise
empty object of ComfyUI's `BaseModel` (`QwenImage` for a Qwen-Image transformer, because aliases depend on the class).
What is written here around the shipped functions are the lines of `comfy.sd.load_lora_for_models` (key map, convert,
load, patch a clone) and of `LoraLoader.load_lora` in `nodes.py` (read the file), and the call of `patch_model`, which
ComfyUI makes before it samples. Its transformers of other families have names of their own: there only the keys that
carry the model's own path (`lora_unet_...`, `diffusion_model....`) are matched, by the rule that holds for all models.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from harness.loaders.checkouts import CHECKOUTS
from harness.loaders.protocol import loader
from harness.loaders.quiet import quiet

if TYPE_CHECKING:
    import torch

CHECKOUT = CHECKOUTS["comfyui"]
MODEL_CLASSES = {"QwenImageTransformer2DModel": "QwenImage"}
FORMATS = ("kohya", "comfyui", "diffusers", "diffsynth")
_PATCHER = "_lora_harness_comfyui"


def unload(model: torch.nn.Module) -> None:
    """Undo the last load: unpatch, then patch again with the model patcher that was there before it."""
    patchers = getattr(model, _PATCHER)
    patchers.pop().unpatch_model()
    if len(patchers) > 1:
        patchers[-1].patch_model()


@loader(formats=FORMATS, unload=unload, strength_argument="strength_model")
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
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(lora), safe_load=True))
    loaded = comfy.lora.load_lora(tensors, key_map)
    patched = patcher.clone()
    patched.add_patches(loaded, strength)
    return patched


def _patchers(model: torch.nn.Module) -> list[Any]:
    """Return the model patchers of `model`, the plain one first, one more for each load."""
    if not hasattr(model, _PATCHER):
        import torch

        comfy, cpu = shipped(), torch.device("cpu")
        setattr(model, _PATCHER, [comfy.model_patcher.ModelPatcher(_base_model(model), cpu, cpu)])
    patchers: list[Any] = getattr(model, _PATCHER)
    return patchers


def _base_model(model: torch.nn.Module) -> torch.nn.Module:
    import torch

    classes = (MODEL_CLASSES.get(kind.__name__) for kind in type(model).__mro__)
    kind = getattr(shipped().model_base, next(filter(None, classes), "BaseModel"))
    base: torch.nn.Module = kind.__new__(kind)
    torch.nn.Module.__init__(base)  # BaseModel's own would build a second, full-sized transformer
    base.diffusion_model = model
    base.model_config = SimpleNamespace(unet_config={})  # type: ignore[assignment]
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
