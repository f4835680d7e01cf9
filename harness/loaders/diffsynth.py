"""The live loaders `diffsynth` and `diffsynth-<version>`: DiffSynth-Studio's shipped `GeneralLoRALoader`, unmodified.

`import diffsynth` needs torchvision and video libraries; its LoRA code needs only torch. So each release is imported
under a private name whose parent packages are empty objects that carry the real `__path__`, which also lets two
releases run in one process.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from harness.errors import LoaderSpecError
from harness.loaders.protocol import Load, loader
from harness.loaders.quiet import quiet
from harness.loaders.releases import Release, find_releases

if TYPE_CHECKING:
    import torch

FORMATS = ("diffsynth",)
GET = "get it with `python -m harness.loaders.releases diffsynth=={version}`"
NEWEST_TESTED = "2.1.12"


@loader(formats=FORMATS, strength_argument="alpha")
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Fuse `lora` into `model` with the newest release found: W + strength * (what its converter makes of B @ A).

    Raises:
        LoaderSpecError: no release of diffsynth is there.
    """
    _fuse(newest_release(), model, lora, strength)


def release_loader(version: str) -> Load:
    """Return the loader of the release `version`, declared like `load`.

    Raises:
        LoaderSpecError: this release is not there.
    """
    release = _find(version)

    @loader(formats=FORMATS, strength_argument="alpha")
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        _fuse(release, model, lora, strength)

    return load


def newest_release() -> Release:
    """Return the newest release found.

    Raises:
        LoaderSpecError: there is none; the message has the command that gets one.
    """
    found = find_releases("diffsynth")
    if not found:
        raise LoaderSpecError(f"diffsynth: no release is installed; {GET.format(version=NEWEST_TESTED)}")
    return found[-1]


def _find(version: str) -> Release:
    found = {release.version: release for release in find_releases("diffsynth")}
    if version not in found:
        there = f" (found: {', '.join(found)})" if found else ""
        raise LoaderSpecError(f"diffsynth-{version}: this release is not here{there}; {GET.format(version=version)}")
    return found[version]


def _fuse(release: Release, model: torch.nn.Module, lora: Path, strength: float) -> None:
    """Run the lines of the shipped `BasePipeline.load_lora` that follow the choice of the file."""
    general, files = _shipped(release)
    base = next(model.parameters())  # a pipeline has one dtype, the one its models were loaded in
    with quiet():
        lora_loader = general.GeneralLoRALoader(torch_dtype=base.dtype, device=base.device)
        weights = files.load_state_dict(str(lora), torch_dtype=base.dtype, device=base.device)
        lora_loader.fuse_lora_to_base_model(model, lora_loader.convert_state_dict(weights), alpha=strength)


def _shipped(release: Release) -> tuple[ModuleType, ModuleType]:
    """Return the shipped modules `diffsynth.utils.lora.general` and `diffsynth.core.loader.file`."""
    alias = f"_lora_harness_diffsynth_{abs(hash(release)):x}"
    for package in ("", ".core", ".core.loader"):
        _empty_package(alias + package, release.folder.joinpath("diffsynth", *package.split(".")[1:]))
    general = importlib.import_module(f"{alias}.utils.lora.general")
    return general, importlib.import_module(f"{alias}.core.loader.file")


def _empty_package(name: str, folder: Path) -> None:
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
