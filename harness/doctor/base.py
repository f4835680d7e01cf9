"""The base weights a LoRA was trained on: names and norms from one safetensors file or a folder of shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import LoraFileError
from harness.files import LoraAdapter, SafetensorsFile, match_modules, read_header
from harness.verdict.blocks import family_of

_WEIGHT = ".weight"
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.")


@dataclass(frozen=True)
class BaseWeights:
    """Weight matrices of a model by module name, `files` telling which file has each; nothing is loaded."""

    path: Path
    files: Mapping[str, SafetensorsFile]
    prefix: str = ""
    _norms: dict[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path | str) -> BaseWeights:
        """Read the headers of a safetensors file, or of every safetensors file in a folder.

        Raises:
            LoraFileError: nothing readable there, or no weight matrix in it.
        """
        path = Path(path)
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise LoraFileError(path, "a folder without safetensors files, base weights are needed")
        files = {
            key[: -len(_WEIGHT)]: file for file in map(read_header, found) for key in file.keys if _is_matrix(file, key)
        }
        if not files:
            raise LoraFileError(path, "holds no weight matrix, base weights are needed")
        return cls(path, files, shared_prefix(files))

    @property
    def names(self) -> list[str]:
        """Module names without the checkpoint's own prefix."""
        return [name[len(self.prefix) :] for name in self.files if name.startswith(self.prefix)]

    def match(self, adapter: LoraAdapter) -> dict[str, str]:
        """Return {module of the adapter: module of this base}."""
        return match_modules(adapter, self.names)[0]

    def norm(self, name: str) -> float:
        """Return ||W||_F, accumulated in float64: torch's own float32 norm is off by 2e-3 at 40 million elements."""
        import torch

        if name not in self._norms:
            file = self.files[self.prefix + name]
            weight = file.tensor(self.prefix + name + _WEIGHT)
            weight = weight if weight.dtype.itemsize > 1 else weight.float()
            self._norms[name] = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        return self._norms[name]

    def families(self) -> dict[str, int]:
        """Return the kinds of layers (`transformer_blocks.N.attn.to_q`) with their number of parameters."""
        sizes: dict[str, int] = {}
        for name in self.names:
            info = self.files[self.prefix + name].tensors[self.prefix + name + _WEIGHT]
            sizes[family_of(name)] = sizes.get(family_of(name), 0) + info.elements
        return sizes


def norm_of(values: Iterable[float]) -> float:
    """Return the root of the sum of squares."""
    return math.sqrt(math.fsum(value * value for value in values))


def _is_matrix(file: SafetensorsFile, key: str) -> bool:
    shape = file.tensors[key].shape
    return key.endswith(_WEIGHT) and len(shape) >= 2 and min(shape[:2]) > 1


def shared_prefix(files: Iterable[str]) -> str:
    """Return the known prefix that most module names share, empty when there is none."""
    files = list(files)
    best = max(_PREFIXES[1:], key=lambda prefix: sum(name.startswith(prefix) for name in files))
    return best if 2 * sum(name.startswith(best) for name in files) > len(files) else ""
