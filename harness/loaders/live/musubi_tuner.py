"""The live loaders `musubi-tuner` (merged while it reads) and `musubi-tuner-network`: its own code, from a checkout.

Set `LORA_HARNESS_MUSUBI_TUNER` to the folder of musubi-tuner; its files run unmodified. What is written here around the
shipped functions:

- `load_safetensors_with_lora_and_fp8` (`utils/lora_utils.py`), which merges while it reads the checkpoint, as
  `qwen_image_generate_image.py` calls it; the model's weights are saved for it to a temporary checkpoint.
- the lines of `merge_lora_weights` in `wan_generate_video.py`, which other models are merged with:
  `create_arch_network_from_weights(..., for_inference=True)`, then `merge_to`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.checkouts import Checkout
from harness.loaders.declaration import loader
from harness.loaders.kohya import merge_while_reading
from harness.loaders.live import LiveLoader, quiet

if TYPE_CHECKING:
    import torch

CHECKOUT = Checkout(
    "musubi-tuner",
    "LORA_HARNESS_MUSUBI_TUNER",
    "src/musubi_tuner/utils/lora_utils.py",
    "https://github.com/kohya-ss/musubi-tuner",
    inside="src",
)
_declared = functools.partial(
    loader, formats={"kohya"}, variants={"lora", "loha", "lokr"}, strength_argument="lora_multiplier"
)


@_declared(benches={"qwen-image", "qwen-image-fused"})
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Merge the kohya file `lora` into `model` while its weights are read from a checkpoint.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    lora_utils, _ = shipped()
    with quiet(""):
        merge_while_reading(lora_utils, model, lora, strength)


@_declared(benches={"qwen-image"})
def load_network(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Make a network for the classes of Qwen-Image's blocks that the file names, and merge it into `model`.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    from safetensors.torch import load_file

    _, module = shipped()
    base = next(model.parameters())
    with quiet(""):
        weights = load_file(str(lora))
        network = module.create_arch_network_from_weights(strength, weights, unet=model, for_inference=True)
        network.merge_to(None, model, weights, device=base.device, non_blocking=False)


@functools.cache
def shipped() -> tuple[Any, Any]:
    """Return the shipped modules `utils.lora_utils` and `networks.lora_qwen_image`.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    with quiet(""):
        lora_utils, networks = CHECKOUT.modules(
            "musubi_tuner.utils.lora_utils", "musubi_tuner.networks.lora_qwen_image"
        )
    return lora_utils, networks


LIVE = (
    LiveLoader("musubi-tuner", load, checkout=CHECKOUT, shipped=shipped),
    LiveLoader("musubi-tuner-network", load_network, checkout=CHECKOUT, shipped=shipped),
)
