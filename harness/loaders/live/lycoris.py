"""The live loaders `lycoris` (merged) and `lycoris-runtime`: LyCORIS' own `create_lycoris_from_weights`.

LyCORIS names a module `<prefix>_<path with _ for dots>`. The prefix is a setting of the library, `lycoris` unless a
preset says otherwise, so a file with kohya's prefixes is read the documented way: `apply_preset({"lora_prefix": ...})`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import held
from harness.loaders.protocol import EVERY_BENCH

if TYPE_CHECKING:
    import torch

_declared = functools.partial(
    loader,
    formats={"kohya"},
    benches=[name for name in EVERY_BENCH if name != "gpt2"],  # it has no layers of transformers' own kind
    variants=("lora", "conv", "tucker", "dora", "loha", "lokr", "full"),
)
PREFIXES = ("lycoris", "lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer")


def unload(model: torch.nn.Module) -> None:
    """Take the network loaded last out of the forward of every module it wraps (`restore`)."""
    held(model).pop().restore()


def set_strength(model: torch.nn.Module, strength: float) -> None:
    """Give the network loaded last another multiplier."""
    held(model)[-1].set_multiplier(strength)


@_declared(strength_argument="weight")
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Merge the kohya file `lora` into `model`: `network.merge_to(weight=strength)`.

    Raises:
        TypeError: a module of the file has no alpha.
    """
    with quiet("LyCORIS"):
        _network(model, lora, 1.0).merge_to(strength)


@_declared(unload=unload, set_strength=set_strength, strength_argument="multiplier")
def load_runtime(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Wrap the modules of `model`: `create_lycoris_from_weights(strength, ...)`, then `network.apply_to()`.

    A second load wraps what the first one wrapped, so both are active.

    Raises:
        TypeError: a module of the file has no alpha.
    """
    with quiet("LyCORIS"):
        network = _network(model, lora, strength)
        network.apply_to()
    held(model).append(network)


def _network(model: torch.nn.Module, lora: Path, multiplier: float) -> Any:
    from lycoris import (  # type: ignore[import-untyped]
        LycorisNetwork,
        create_lycoris_from_weights,
    )

    with _prefix(LycorisNetwork, _prefix_of(lora)):
        network, _ = create_lycoris_from_weights(multiplier, str(lora), model)
    return network.eval()


def _prefix_of(lora: Path) -> str:
    from safetensors import safe_open

    with safe_open(lora, "pt") as file:
        first = next(iter(file.keys()), "")
    return next((prefix for prefix in PREFIXES if first.startswith(f"{prefix}_")), PREFIXES[0])


@contextlib.contextmanager
def _prefix(network: Any, prefix: str) -> Iterator[None]:
    """Set the library's prefix inside the block; it is a setting of the class, so it is put back."""
    before = network.LORA_PREFIX
    network.apply_preset({"lora_prefix": prefix})
    try:
        yield
    finally:
        network.apply_preset({"lora_prefix": before})


LIVE = (
    LiveLoader("lycoris", load, ("lycoris-lora",), imports=("lycoris",), any_model=True),
    LiveLoader("lycoris-runtime", load_runtime, ("lycoris-lora",), imports=("lycoris",), any_model=True),
)
