"""What is right, in pictures: the base denoiser with the LoRA merged at a strength, in float64 and rounded once."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.files import LoraAdapter, match_modules, read_lora
from harness.images.pipelines import OpenPipeline
from harness.reference.closed_form import product
from harness.text import count

_KEEP = 64_000_000  # products of up to this many values are kept between strengths; larger ones are formed again


class Reference:
    """One copy of the base denoiser whose adapted weights follow the strength.

    W' = W + strength * scale * B @ A with scale = alpha / rank (alpha / sqrt(rank) for rsLoRA, 1 without alpha).
    """

    def __init__(self, opened: OpenPipeline, adapter: LoraAdapter) -> None:
        self.adapter = adapter
        self._base = dict(opened.base.named_modules())
        self.model = opened.fresh()
        self._names, self.unmatched = _matched(opened, adapter)
        self._layers = dict(self.model.named_modules())
        self._kept: dict[str, Tensor] = {}
        self._keep = sum(self._weight(name).numel() for name in self._names.values()) <= _KEEP

    @torch.no_grad()
    def at(self, strength: float) -> nn.Module:
        """Return the one model, now merged at `strength`."""
        for file_name, name in self._names.items():
            weight: Tensor = self._layers[name].weight
            base = self._weight(name)
            delta = self._delta(file_name).reshape(base.shape)
            weight.copy_(base.double() + strength * delta if strength else base)
        return self.model

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self._base[name].weight
        return weight

    def _delta(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        a, b = self.adapter.tensors(name)
        delta = self.adapter.modules[name].trained_scale * product(a.flatten(1), b.flatten(1))
        if self._keep:
            self._kept[name] = delta
        return delta


def open_lora(lora: Path, opened: OpenPipeline) -> LoraAdapter:
    """Read the LoRA and give the base denoiser the form it was trained on (merged QKV for `to_qkv` names).

    Raises:
        UserError: the file cannot be read, is no plain LoRA, or fits no module of the denoiser.
    """
    adapter = read_lora(lora)
    odd = sorted({module.variant for module in adapter.modules.values()} - {"lora"})
    if odd:
        raise UserError(
            f"{lora}: variant {', '.join(odd)}: the image reference is for plain LoRA; use the weight checks"
        )
    if any(module.name.endswith(("to_qkv", "add_qkv_proj")) for module in adapter.modules.values()):
        _fuse(opened)
    _matched(opened, adapter)
    return adapter


def _fuse(opened: OpenPipeline) -> None:
    names = {name.rpartition(".")[2] for name, _ in opened.base.named_modules()}
    if "to_qkv" in names or "add_q_proj" not in names or type(opened.base).__name__ != "QwenImageTransformer2DModel":
        return
    from harness.benches.qwen_image import fuse_qkv

    opened.base = fuse_qkv(opened.fresh()).requires_grad_(False).eval()


def _matched(opened: OpenPipeline, adapter: LoraAdapter) -> tuple[dict[str, str], tuple[str, ...]]:
    layers = {name: m for name, m in opened.base.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    names, unmatched = match_modules(adapter, layers)
    if not names:
        example = next(iter(adapter.modules), "none")
        raise UserError(
            f"{adapter.path}: none of its {count(len(adapter.modules), 'module')} (such as {example}) is in the "
            f"{opened.denoiser} of {opened.name}; is it a LoRA for another model?"
        )
    for file_name, name in names.items():
        _check_fit(adapter, file_name, layers[name].weight)
    return names, unmatched


def _check_fit(adapter: LoraAdapter, name: str, weight: Tensor) -> None:
    module = adapter.modules[name]
    kernel = math.prod(module.kernel) if module.kernel else 1
    wanted = (module.out_features, module.in_features * kernel)
    found = (weight.shape[0], weight[0].numel())
    if not weight.is_floating_point() or wanted != found:
        raise UserError(
            f"{adapter.path}: {name}: its B @ A is {wanted}, but the model's weight is {found} {weight.dtype}; "
            "the reference needs the unquantised model it was trained on"
        )
