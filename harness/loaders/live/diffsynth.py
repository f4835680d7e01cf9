"""The live loaders `diffsynth`, `diffsynth-hot` and `diffsynth-flux`: DiffSynth-Studio's own.

The first fuses with the shipped `GeneralLoRALoader`; `diffsynth-hot` leaves the LoRA beside the layers of a model
with VRAM management, as `pipe.load_lora(..., hotload=True)` does; `diffsynth-flux` fuses with `FluxLoRALoader`.

`import diffsynth` needs torchvision and video libraries; its LoRA code needs only torch. So each release is imported
under a private name whose parent packages are empty objects that carry the real `__path__`, which also lets two
releases run in one process.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import renamed
from harness.loaders.releases import Package, Release

if TYPE_CHECKING:
    import torch

_SECOND = Version("2.0.0")
PACKAGE = Package("diffsynth", tested=("2.1.12", "2.0.4"))
FORMATS = ("diffsynth",)
FLUX_UNSUPPORTED: dict[tuple[str, ...], str] = {
    ("kohya", "lora"): "kohya's FLUX files have Black Forest Labs' names",
    ("diffusers", "qkv-merged"): "diffusers writes FLUX with q, k and v apart",
}


@loader(formats=FORMATS, strength_argument="alpha")
def load(model: torch.nn.Module, lora: Path, *, release: Release, strength: float = 1.0) -> None:
    """Fuse `lora` into `model`: W + strength * (what the converter of `release` makes of B @ A).

    What is written here are the lines of the shipped `BasePipeline.load_lora` that follow the choice of the file.
    """
    if Version(release.version) < _SECOND:
        _load_first(release, model, lora, strength)
        return
    lora_loader, tensors = _converted(release, "general.GeneralLoRALoader", model, lora)
    with quiet():
        lora_loader.fuse_lora_to_base_model(model, tensors, alpha=strength)


def _load_first(release: Release, model: torch.nn.Module, lora: Path, strength: float) -> None:
    """Do what releases before 2.0 do: one call merges what the file holds.

    Those before 1.1.8 have another class for it, written for the models of that time, which asks nothing of a model but
    its state; what read the file then gave its tensors as they are.
    """
    from safetensors.torch import load_file

    base = next(model.parameters())
    with quiet():
        weights = {name: tensor.to(base) for name, tensor in load_file(lora).items()}
        if (release.folder / release.name / "lora").is_dir():
            merging = _module(release, "lora").GeneralLoRALoader(device=base.device, torch_dtype=base.dtype)
        else:
            merging = _module(release, "models.lora").GeneralLoRAFromPeft()
        merging.load(model, weights, alpha=strength)


def clear(model: torch.nn.Module) -> None:
    """Run the lines of the shipped `BasePipeline.clear_lora`, which takes every LoRA away."""
    module: Any
    for module in model.modules():
        if hasattr(module, "lora_A_weights"):  # its LoRAHotLoadMixin
            module.lora_A_weights.clear()
            module.lora_B_weights.clear()


@loader(formats=FORMATS, benches=("qwen-image",), unload=clear, strength_argument="alpha")
def load_hot(model: torch.nn.Module, lora: Path, *, release: Release, strength: float = 1.0) -> None:
    """Hot-load `lora`: the shipped `AutoWrappedLinear` layers compute it beside the weights.

    What is written here are the lines of the shipped `BasePipeline.load_lora` for `hotload=True`.
    """
    import torch

    vram = _module(release, "core.vram.layers")
    if not getattr(model, "vram_management_enabled", False):
        base = next(model.parameters())
        places = ("offload", "onload", "preparing", "computation")
        config = {f"{p}_dtype": base.dtype for p in places} | {f"{p}_device": base.device for p in places}
        vram.enable_vram_management(model, {torch.nn.Linear: vram.AutoWrappedLinear}, config)
    _, tensors = _converted(release, "general.GeneralLoRALoader", model, lora)
    for module in model.modules():
        if isinstance(module, vram.LoRAHotLoadMixin) and f"{module.name}.lora_B.weight" in tensors:
            module.lora_A_weights.append(tensors[f"{module.name}.lora_A.weight"] * strength)
            module.lora_B_weights.append(tensors[f"{module.name}.lora_B.weight"])


@loader(
    formats=("kohya", "diffusers"),
    benches=("flux",),
    variants=("lora", "qkv-merged"),
    unsupported=FLUX_UNSUPPORTED,
    strength_argument="alpha",
)
def load_flux(model: torch.nn.Module, lora: Path, *, release: Release, strength: float = 1.0) -> None:
    """Fuse the FLUX file `lora` with the shipped `FluxLoRALoader`, under the names that DiffSynth's model has."""
    lora_loader, tensors = _converted(release, "flux.FluxLoRALoader", model, lora)
    names = _flux_names(lora_loader.diffusers_rename_dict, model)
    with quiet():
        lora_loader.fuse_lora_to_base_model(renamed(model, names), tensors, alpha=strength)


def _flux_names(shipped: dict[str, str], model: Any) -> dict[str, object]:
    """Return DiffSynth's name for the weight of every layer; q, k, v (and the MLP) are rows of one layer there."""
    rows = {"to_q": (0, "to_qkv"), "to_k": (1, "to_qkv"), "to_v": (2, "to_qkv"), "proj_in_besides_attn": (3, "")}
    names: dict[str, object] = {}
    for old, new in shipped.items():
        if not old.endswith(".lora_A.weight"):
            continue
        parent, _, last = new.removesuffix(".lora_A.weight").rpartition(".")
        index, merged = rows.get(last.removeprefix("a_").removeprefix("b_"), (-1, ""))
        single = parent.startswith("single_blocks")
        merged = "to_qkv_mlp" if single else last[:2] + merged
        target = f"{parent}.{last if index < 0 else merged}.weight"
        count = model.config.num_single_layers if single else model.config.num_layers
        for block in range(count):
            layer = old.removeprefix("transformer.").removesuffix(".lora_A.weight").replace("blockid", str(block))
            there = target.replace("blockid", str(block))
            names[f"{layer}.weight"] = there if index < 0 else (there, (0, index, 0))
    return names


def _converted(release: Release, name: str, model: torch.nn.Module, lora: Path) -> tuple[Any, dict[str, Any]]:
    """Return the shipped loader `<module>.<class>` and what it makes of the file."""
    module, kind = name.split(".")
    base = next(model.parameters())  # a pipeline has one dtype, the one its models were loaded in
    with quiet():
        lora_loader = getattr(_module(release, f"utils.lora.{module}"), kind)(
            torch_dtype=base.dtype, device=base.device
        )
        files = _module(release, "core.loader.file")
        weights = files.load_state_dict(str(lora), torch_dtype=base.dtype, device=base.device)
        return lora_loader, lora_loader.convert_state_dict(weights)


def _module(release: Release, name: str) -> Any:
    """Return the shipped module `diffsynth.<name>`."""
    alias = f"_lora_harness_diffsynth_{abs(hash(release)):x}"
    release.hollow(("", ".core", ".core.loader", ".models"), alias=alias)
    return importlib.import_module(f"{alias}.{name}")


LIVE = (
    LiveLoader("diffsynth", load, package=PACKAGE),
    LiveLoader("diffsynth-hot", load_hot, package=PACKAGE),
    LiveLoader("diffsynth-flux", load_flux, package=PACKAGE),
)
