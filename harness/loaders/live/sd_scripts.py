"""The live loaders `sd-scripts` (merged) and `sd-scripts-runtime`: kohya's own networks and merging, from a checkout.

Set `LORA_HARNESS_SD_SCRIPTS` to the folder of sd-scripts; its files run unmodified. What is written here around the
shipped functions:

- UNet and CLIP text encoder (`networks/lora.py`): the lines of `sdxl_minimal_inference.py` and `gen_img.py`, which are
  `create_network_from_weights(..., for_inference=True)`, then `merge_to`, or `apply_to` and `load_state_dict`. The part
  of the pipeline that is not under test is an empty module.
- Other transformers (`library/lora_utils.py`): `load_safetensors_with_lora_and_fp8`, which merges while it reads the
  checkpoint, as `load_hunyuan_image_model` calls it; the model's weights are saved for it to a temporary checkpoint.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.checkouts import Checkout
from harness.loaders.declaration import loader
from harness.loaders.kohya import merge_while_reading
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import family, held

if TYPE_CHECKING:
    import torch

CHECKOUT = Checkout(
    "sd-scripts",
    "LORA_HARNESS_SD_SCRIPTS",
    "networks/lora.py",
    "https://github.com/kohya-ss/sd-scripts",
    absent=("torchvision", "cv2"),
)
NETWORK_BENCHES, _NETWORK_FAMILIES = ("sd-unet", "clip-text"), ("unet", "clip")
_OTHER_PARTS = ("tucker", "dora", "loha", "lokr", "full")
UNSUPPORTED: dict[tuple[str, ...], str] = {
    (variant,): "its networks have lora_up and lora_down alone; LyCORIS reads its own files" for variant in _OTHER_PARTS
}
_declared = functools.partial(
    loader,
    formats={"kohya"},
    variants=("lora", "conv", *_OTHER_PARTS),
    unsupported=UNSUPPORTED,
    strength_argument="multiplier",
)


def unload(model: torch.nn.Module) -> None:
    """Switch the network loaded last off (`set_enabled(False)`), the way sd-scripts has to do without it."""
    held(model).pop().set_enabled(False)


def set_strength(model: torch.nn.Module, strength: float) -> None:
    """Give the network loaded last another multiplier."""
    held(model)[-1].set_multiplier(strength)


@_declared(benches=("qwen-image", "qwen-image-fused", *NETWORK_BENCHES))
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Merge the kohya file `lora` into `model`: W + multiplier * alpha / rank * B @ A.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    _, lora_utils = shipped()
    with quiet(""):
        if family(model) not in _NETWORK_FAMILIES:
            merge_while_reading(lora_utils, model, lora, strength)
        else:
            network, tensors = _network(model, lora, strength)
            base = next(model.parameters())
            network.merge_to(*_pair(model), tensors, base.dtype, base.device)


@_declared(benches=NETWORK_BENCHES, unload=unload, set_strength=set_strength)
def load_runtime(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Replace the forward of the adapted layers of a UNet or CLIP text encoder; a second load wraps the first.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
        NotImplementedError: `model` is neither a UNet nor a CLIP text encoder.
    """
    shipped()
    if family(model) not in _NETWORK_FAMILIES:
        raise NotImplementedError(f"sd-scripts has no network for {type(model).__name__}")
    with quiet(""):
        network, tensors = _network(model, lora, strength)
        network.apply_to(*_pair(model))
        left = network.load_state_dict(tensors, False)
        print(f"weights are loaded: {left}")  # as gen_img.py says it
        base = next(model.parameters())
        network.to(base.device, dtype=base.dtype).eval()
    held(model).append(network)


def _pair(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return (text encoder, UNet), an empty module for the one that is not under test."""
    import torch

    other = torch.nn.Module()
    return (other, model) if family(model) == "unet" else (model, other)


def _network(model: torch.nn.Module, lora: Path, multiplier: float) -> tuple[Any, dict[str, torch.Tensor]]:
    networks, _ = shipped()
    text_encoder, unet = _pair(model)
    network, tensors = networks.create_network_from_weights(
        multiplier, str(lora), None, text_encoder, unet, for_inference=True
    )
    return network, tensors


@functools.cache
def shipped() -> tuple[Any, Any]:
    """Return the shipped modules `networks.lora` and `library.lora_utils`.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    # imported before anything stands in for torchvision, which both of them look for
    from diffusers import AutoencoderKL  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    with quiet(""):
        networks, lora_utils = CHECKOUT.modules("networks.lora", "library.lora_utils")
    return networks, lora_utils


_NEEDS = ("diffusers", "transformers")
LIVE = (
    LiveLoader("sd-scripts", load, _NEEDS, checkout=CHECKOUT, shipped=shipped),
    LiveLoader("sd-scripts-runtime", load_runtime, _NEEDS, checkout=CHECKOUT, shipped=shipped),
)
