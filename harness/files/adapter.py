"""What every format becomes: a `LoraAdapter` of `LoraModule`s, and what was wrong with the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LoraFileError
from harness.files.safetensors_file import SafetensorsFile
from harness.files.text import printable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a file: a stable code, the key at fault, one clause, and whether a module is lost by it."""

    code: str
    key: str
    what: str
    fatal: bool = False

    def text(self) -> str:
        """Return the problem on one line, with the key when there is one."""
        return f"{self.key}: {self.what}" if self.key else self.what


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module of a file.

    `name` is the module path as the file says it, without the format's prefix: dotted, or flattened with `_` (kohya).
    `component` is the part of the pipeline that the prefix named (`transformer`, `unet`, `te1`, ...), empty when none.
    `alpha` is None when the file carries none; `rslora` says alpha is divided by sqrt(rank).
    `keys` maps a role (`A`, `B`, `alpha`, `magnitude`, ...) to the key in the file.
    `kernel` is the convolution kernel of A: [r, in, *kernel], empty for a linear layer.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    alpha: float | None
    rslora: bool
    dtype: str
    keys: Mapping[str, str]
    variant: str = "lora"
    component: str = ""
    kernel: tuple[int, ...] = ()

    @property
    def trained_scale(self) -> float:
        """The factor on B @ A in training: alpha / rank, alpha / sqrt(rank), or 1.0 when the file has no alpha."""
        if self.alpha is None or self.rank == 0:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class LoraAdapter:
    """A parsed LoRA file.

    `path` is what a loader gets: the folder for `peft`, else the file. `modules` is keyed by module name, preceded by
    `component:` for every component but the first when the file adapts several. `alpha_source` is `tensor`, `config`
    (adapter_config.json), `header` (lora_adapter_metadata) or `none`. `flattened` names must be matched against a
    model with `match_modules`. `config` is the adapter configuration as far as the file has one.
    """

    path: Path
    format: str
    modules: Mapping[str, LoraModule]
    metadata: Mapping[str, str]
    unused_keys: tuple[str, ...]
    alpha_source: str
    flattened: bool
    file: SafetensorsFile = field(repr=False)
    problems: tuple[Problem, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A: [r, in] and B: [out, r] of one module, as stored (convolutions: [r, in, *kernel], [out, r, 1, 1]).

        Raises:
            KeyError: the file has no such module.
            LoraFileError: the module's variant has no A and B (LoHa, LoKr), or the file changed.
        """
        keys = self.modules[name].keys
        if "A" not in keys or "B" not in keys:
            variant = self.modules[name].variant
            raise LoraFileError(self.path, f"a {variant} module has no A and B", key=printable(name))
        return self.file.tensor(keys["A"]), self.file.tensor(keys["B"])


@dataclass(frozen=True)
class LoraWeights:
    """One module in memory, to be written: a: [r, in], b: [out, r], and alpha (None: the file shall carry none)."""

    a: Tensor
    b: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        """The rank, from the shape of `a`."""
        return int(self.a.shape[0])
