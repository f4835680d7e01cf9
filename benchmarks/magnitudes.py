"""DoRA in files made here: the magnitudes beside a pair, and what a reader that knows them makes of a weight.

`+out` is `dora_scale` with one number per output, `+in` with one per input (as LyCORIS writes them, and normalises by
them), `+vector` the `lora_magnitude_vector` of PEFT and diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KINDS = {"out": "dora_scale", "in": "dora_scale", "vector": "lora_magnitude_vector"}


@dataclass(frozen=True)
class Change:
    """A layer's weight before and after a file was loaded."""

    before: torch.Tensor
    after: torch.Tensor


@dataclass(frozen=True)
class Dora:
    """The update B @ A of a layer whose weight is `[rows, *kernel]`, and its magnitudes per output or per input."""

    product: torch.Tensor
    kernel: tuple[int, ...]
    magnitudes: torch.Tensor
    per_input: bool

    def weight(self, before: torch.Tensor, scale: float, *, plain: bool = False) -> torch.Tensor:
        """Return W + scale * B @ A, with its rows (or columns) brought to their magnitudes unless `plain`."""
        merged = (before.double().flatten(1) + scale * self.product.double()).reshape(-1, *self.kernel)
        if plain:
            return merged.reshape(before.shape)
        kept = 1 if self.per_input else 0
        others = tuple(axis for axis in range(merged.ndim) if axis != kept)
        norms = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
        return (merged / norms * self.magnitudes.double().reshape(norms.shape)).reshape(before.shape)


def drawn(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return magnitudes for a layer whose weight has `shape`, in the shape in which files hold them."""
    count, rest = shape[1] if kind == "in" else shape[0], [1] * (len(shape) - 2)
    values = 0.5 + torch.rand(count, generator=generator)
    if kind == "vector":
        return values.reshape(1, count, *rest) if rest else values
    return values.reshape(1, count, *rest) if kind == "in" else values.reshape(count, 1, *rest)


def fit(change: Change, meant: Dora, scale: float) -> str:
    """Return `ok`, `dropped`, `plain` where the magnitudes were left out, or `other`."""
    before, after = change.before.detach().double(), change.after.detach().double()
    if bool((after - before).norm() < 1e-7 * before.norm()):
        return "dropped"
    for kind, plain in (("ok", False), ("plain", True)):
        wanted = meant.weight(before, scale, plain=plain)
        if bool((after - wanted).norm() < 0.01 * (wanted - before).norm()):
            return kind
    return "other"
