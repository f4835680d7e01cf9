"""A linear layer in scaled fp8, as ComfyUI, sd-scripts and musubi-tuner keep it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_FP8 = torch.float8_e4m3fn


class ScaledLinear(nn.Linear):
    """W = `weight` (in eight bits) * `scale_weight`, one number for the layer; computed in the dtype of its input."""

    scale_weight: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> ScaledLinear:
        """Return a layer with the weight of `layer` rounded."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.data.abs().max().clamp_min(torch.finfo(torch.float32).tiny) / torch.finfo(_FP8).max
        new.weight = nn.Parameter((layer.weight.data / scale).to(_FP8), requires_grad=False)
        new.bias = layer.bias
        new.register_buffer("scale_weight", scale)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Return x @ W^T + b."""
        return functional.linear(input, self.weight.to(input.dtype) * self.scale_weight.to(input.dtype), self.bias)
