"""The live loaders `adapters` (merged) and `adapters-runtime`: AdapterHub's `load_adapter`, on models of transformers.

AdapterHub has files of its own, with one rank and one alpha, and LoRA for queries, keys, values and the outer layers of
the MLP alone. What a PEFT folder holds is put into an adapter of that kind, and `save_adapter` writes the file that
`load_adapter` then reads; nothing is multiplied on the way. It has no strength, and it does not add two LoRAs:
`merge_adapter` takes one, and `Stack` sends the output of one into the next.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LoaderSpecError, one_line
from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import held

if TYPE_CHECKING:
    import torch

PARTS = ("lora_A", "lora_B")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_declared = functools.partial(
    loader,
    formats={"peft"},
    benches={"tiny-llama", "clip-text"},
    uniform={"rank", "alpha"},
    modules=r"\.(?:q_proj|k_proj|v_proj|up_proj|down_proj|fc1|fc2)$",
    strength_argument=None,
)


def unload(model: torch.nn.Module) -> None:
    """Take the adapter away again, out of the weights too (`reset_adapter`, `delete_adapter`)."""
    loaded: Any = model
    loaded.reset_adapter()
    loaded.set_active_adapters(None)
    loaded.delete_adapter(held(model).pop())


@_declared(unload=unload)
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Merge the LoRA into the weights of `model` with `merge_adapter`.

    Raises:
        NotImplementedError: there is a LoRA already, or AdapterHub has none for a module of the file.
    """
    with quiet("transformers", "adapters"):
        _loaded(model, lora).merge_adapter(held(model)[-1])


@_declared(unload=unload)
def load_runtime(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Compute the LoRA beside the layers of `model`, as an active adapter.

    Raises:
        NotImplementedError: there is a LoRA already, or AdapterHub has none for a module of the file.
    """
    with quiet("transformers", "adapters"):
        _loaded(model, lora)


def _loaded(model: Any, lora: Path) -> Any:
    """Return `model` with the adapter loaded and active."""
    if held(model):
        raise NotImplementedError("AdapterHub does not add two LoRAs: merge_adapter takes one, and Stack chains them")
    if not hasattr(model, "adapters_config"):
        shipped().init(model)
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        _write(model, lora, folder)
        name = model.load_adapter(folder, load_as="lora", set_active=True, use_safetensors=True)
    held(model).append(name)
    return model


def _write(model: Any, lora: Path, folder: str) -> None:
    """Save what a PEFT folder holds as an adapter of AdapterHub, without the half that a pair of it lacks."""
    from safetensors.torch import load_file, save_file

    said = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    if said.get("use_rslora") or said.get("use_dora"):
        raise NotImplementedError("AdapterHub divides by the rank, and its DoRA has a scale of its own")
    tensors = {_place(model, key): value for key, value in load_file(str(lora / "adapter_model.safetensors")).items()}
    layers = {layer for layer, _ in tensors}
    model.add_adapter("trained", config=_config(model, said, layers, next(iter(tensors.values()))))
    for (layer, part), value in tensors.items():
        getattr(model.get_submodule(layer).loras["trained"], part).data = value
    model.save_adapter(folder, "trained", use_safetensors=True)
    model.delete_adapter("trained")
    lacking = {f"{layer}.loras.trained.{part}" for layer in layers for part in PARTS if (layer, part) not in tensors}
    if lacking:
        saved = f"{folder}/adapter.safetensors"
        save_file({name: value for name, value in load_file(saved).items() if name not in lacking}, saved)


def _place(model: Any, key: str) -> tuple[str, str]:
    """Return the layer of `model` and the parameter of its LoRA that a tensor of the file is for."""
    found = _KEY.fullmatch(key)
    layers = dict(model.named_modules())
    if found is None or not hasattr(layers.get(found[1]), "loras"):
        raise NotImplementedError(f"{key}: AdapterHub has no LoRA for it")
    return found[1], f"lora_{found[2]}"


def _config(model: Any, said: dict[str, Any], layers: set[str], one: torch.Tensor) -> Any:
    """Return the configuration that adapts at least these layers, with numbers of the dtype of the file."""
    wrapped = [model.get_submodule(layer) for layer in layers]
    places = {each.location_key for each in wrapped}  # the name of the option: "selfattn_lora", "output_lora"
    options = {name: name in places for name in ("selfattn_lora", "intermediate_lora", "output_lora")}
    attention = sorted({each.attn_key for each in wrapped} - {None})
    dtype = str(one.dtype).removeprefix("torch.")
    config = shipped().LoRAConfig
    return config(r=said["r"], alpha=said["lora_alpha"], attn_matrices=attention, dtype=dtype, **options)


@functools.cache
def shipped() -> Any:
    """Return the shipped package.

    Raises:
        LoaderSpecError: it cannot be imported, as with transformers 5.
    """
    try:
        import adapters
    except Exception as error:
        raise LoaderSpecError(f"adapters cannot be imported: {one_line(error)}") from error
    return adapters


_NEEDS = ("adapters", "transformers")
LIVE = (
    LiveLoader("adapters", load, _NEEDS, shipped=shipped, imports=("adapters",)),
    LiveLoader("adapters-runtime", load_runtime, _NEEDS, shipped=shipped, imports=("adapters",)),
)
