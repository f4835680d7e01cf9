"""A bench: one small real model, the layers a LoRA may target in it, and one fixed forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from harness.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Bench:
    """A deterministic small model.

    `make` builds it in float32; `targets` are the suffixes of the layers LoRA is trained on in practice;
    `fused` names, by suffix, the layers whose rows stack several projections, with their number.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    targets: tuple[str, ...]
    run: Callable[[torch.nn.Module], torch.Tensor]
    fused: tuple[tuple[str, int], ...] = ()

    @cached_property
    def _base(self) -> torch.nn.Module:
        return self.make().eval().requires_grad_(False)

    @cached_property
    def _cast(self) -> dict[torch.dtype, torch.nn.Module]:
        return {}

    def base(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """Return the shared model in `dtype` (default float32), to be read and never changed."""
        import torch

        dtype = dtype or torch.float32
        if dtype not in self._cast:
            # nn.Module's own `to`: diffusers' override logs a line on every call
            self._cast[dtype] = torch.nn.Module.to(copy.deepcopy(self._base), dtype)
        return self._cast[dtype]

    def build(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """Return a fresh copy with equal weights every time, rounded to `dtype` (default float32)."""
        return copy.deepcopy(self.base(dtype))

    @cached_property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Every Linear of the model by path, with its (out_features, in_features)."""
        import torch

        found = self._base.named_modules()
        return {n: (m.out_features, m.in_features) for n, m in found if isinstance(m, torch.nn.Linear)}

    @cached_property
    def lora_layers(self) -> tuple[str, ...]:
        """The paths of the layers that `targets` select, in the model's order."""
        return tuple(name for name in self.layers if name.endswith(self.targets))

    def slices(self, layer: str) -> tuple[slice, ...]:
        """The row ranges of `layer` that hold separate projections; one range for an ordinary layer."""
        parts = next((count for suffix, count in self.fused if layer.endswith(suffix)), 1)
        rows = self.layers[layer][0] // parts
        return tuple(slice(i * rows, (i + 1) * rows) for i in range(parts))

    def forward(self, model: torch.nn.Module) -> torch.Tensor:
        """Run `model` once on this bench's fixed input, without gradients."""
        import torch

        with torch.no_grad():
            return self.run(model)


@cache
def get_bench(name: str) -> Bench:
    """Return the bench called `name`.

    Raises:
        UserError: no bench has this name.
    """
    from harness.benches import qwen_image

    for bench in qwen_image.BENCHES:
        if bench.name == name:
            return bench
    raise UserError(f"bench={name!r}: no such bench; known are {', '.join(bench_names())}")


def bench_names() -> tuple[str, ...]:
    """Return the names of all benches."""
    return ("qwen-image", "qwen-image-fused")
