"""One layer that a LoRA may change, and its weight seen as a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "transposed", "conv", "embedding"]


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is the matrix `[rows, columns]`: outputs by inputs.

    A convolution has one column per input channel and kernel place, `[out, in * kh * kw]`; an embedding one column per
    token; `transposed` is a linear layer that stores its weight as [in, out] (transformers' `Conv1D`). `bias` says
    whether it has one.
    """

    kind: Kind
    rows: int
    columns: int
    bias: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def channels(self) -> int:
        """The number of input channels (of a linear layer: of input features)."""
        return self.columns // math.prod(self.kernel)


def layer_of(module: torch.nn.Module) -> Layer | None:
    """Return what `module` is, or None when no LoRA is trained on such a layer."""
    from torch import nn

    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Layer("linear", module.out_features, module.in_features, bias)
    if isinstance(module, nn.Embedding):
        return Layer("embedding", module.embedding_dim, module.num_embeddings)
    if isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module.padding, str):
        columns = module.in_channels * math.prod(module.kernel_size)
        geometry = module.kernel_size, module.stride, module.padding, module.dilation
        return Layer("conv", module.out_channels, columns, bias, *geometry)
    if type(module).__name__ == "Conv1D":  # transformers'; not imported for every model
        columns, rows = module.weight.shape  # type: ignore[misc]  # [in, out]
        return Layer("transposed", rows, columns, bias)
    return None
