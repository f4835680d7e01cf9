"""The live loader `lightx2v`: LightX2V's `LoRALoader`, which merges into a model's weights, from a checkout.

Set `LORA_HARNESS_LIGHTX2V` to the folder of LightX2V. Of it `utils/lora_loader.py` runs unmodified, without the
`__init__` of the package, which imports the whole pipeline. What is written here around it are the lines of
`LoraAdapter` in `models/networks/lora_adapter.py`, which read the file in the dtype of the model and let it be applied
to the dictionary of the model's weights. Its models have their authors' names, so the layers stand under these here.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.loaders.checkouts import Checkout
from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet

if TYPE_CHECKING:
    import torch

CHECKOUT = Checkout(
    "lightx2v", "LORA_HARNESS_LIGHTX2V", "lightx2v/utils/lora_loader.py", "https://github.com/ModelTC/LightX2V"
)


_BLOCKS = r"^(?!condition_embedder\.|proj_out$)"  # files of the bench have diffusers' names for Wan's outer layers
UNSUPPORTED: dict[tuple[str, ...], str] = {
    ("wan21-t2v", "lora"): "its Wan has the names of Wan's authors",
    ("qwen-image", "qkv-merged"): "its Qwen-Image has q, k and v apart",
}


@loader(
    formats={"diffsynth", "comfyui"},
    benches={"qwen-image", "wan21-t2v"},
    variants={"lora", "qkv-merged"},
    unsupported=UNSUPPORTED,
    modules=_BLOCKS,
)
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Add the file `lora` to the weights of `model`.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    from safetensors import safe_open

    base = next(model.parameters())
    with safe_open(str(lora), framework="pt") as file:
        tensors = {key: file.get_tensor(key).to(base.dtype).to(base.device) for key in file.keys()}  # noqa: SIM118
    with quiet(""):
        shipped().LoRALoader().apply_lora(weight_dict=_weights(model), lora_weights=tensors, strength=strength)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of `model`, as views of them, under the names of its authors."""
    from harness.files.architectures import authors_names

    layers = [name for name, _ in model.named_modules() if name]
    known = authors_names(layers, ("Wan",) if type(model).__name__.startswith("Wan") else ())
    other = {alias.others[0]: name for name, alias in known.items() if len(alias.others) == 1}
    split = ((*name.rpartition("."), tensor) for name, tensor in model.state_dict().items())
    return {f"{other.get(layer, layer)}.{kind}": tensor for layer, _, kind, tensor in split}


@functools.cache
def shipped() -> Any:
    """Return the shipped module `utils.lora_loader`.

    Raises:
        LoaderSpecError: there is no checkout, or it cannot be imported.
    """
    for name in ("lightx2v", "lightx2v.utils"):
        package = sys.modules.setdefault(name, ModuleType(name))
        package.__path__ = [str(CHECKOUT.folder().joinpath(*name.split(".")))]
    (module,) = CHECKOUT.modules("lightx2v.utils.lora_loader")
    return module


LIVE = (LiveLoader("lightx2v", load, ("loguru",), checkout=CHECKOUT, shipped=shipped),)
