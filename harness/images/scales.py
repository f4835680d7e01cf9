"""One batched forward at many strengths: a runtime adapter multiplies its branch by one scale per sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Scaling = dict[str, dict[str, float]]  # layer path -> adapter name -> the factor PEFT multiplies B @ A with


class PerSample:
    """A factor per sample of the batch, which multiplies a tensor of any rank from the right.

    A batch that is a multiple as long (classifier-free guidance runs both halves at once) repeats the factors.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = torch.tensor(values)

    def __rmul__(self, branch: Tensor) -> Tensor:
        repeats, rest = divmod(len(branch), len(self.values))
        if rest:
            raise ValueError(f"a batch of {len(branch)} cannot be scaled by {len(self.values)} factors")
        factors = self.values.to(branch).repeat(repeats)
        return branch * factors.view(-1, *[1] * (branch.ndim - 1))


def runtime_scaling(model: nn.Module) -> Scaling | None:
    """Return the scalings of the PEFT layers that are active in `model`, or None when it has none or they are merged.

    Only plain LoRA branches qualify: variants (DoRA, ...) do not multiply a branch by the scaling alone.
    """
    found: Scaling = {}
    for name, layer in model.named_modules():
        if not (
            hasattr(layer, "lora_A")
            and hasattr(layer, "active_adapters")
            and isinstance(getattr(layer, "scaling", None), dict)
        ):
            continue
        if layer.merged or getattr(layer, "disable_adapters", False) or getattr(layer, "lora_variant", None):
            return None
        active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
        if not all(isinstance(layer.scaling[adapter], (int, float)) for adapter in active):
            return None
        found[name] = {adapter: float(layer.scaling[adapter]) for adapter in active}
    return found or None


def same_branches(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models hold the same weights and adapters, so that only scalings differ between them."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextmanager
def per_sample(model: nn.Module, scalings: Sequence[Scaling]) -> Iterator[None]:
    """Give sample i of the next forwards the scalings `scalings[i]`; restored afterwards, whatever happens.

    PEFT keeps the factor in the layer's `scaling` dictionary and multiplies by it, so an object that knows how to
    multiply can stand in for the number.
    """
    layers = dict(model.named_modules())
    saved: Mapping[str, dict[str, float]] = {name: dict(layers[name].scaling) for name in scalings[0]}
    try:
        for name, adapters in scalings[0].items():
            for adapter in adapters:
                layers[name].scaling[adapter] = PerSample([s[name][adapter] for s in scalings])
        yield
    finally:
        for name, values in saved.items():
            layers[name].scaling.update(values)
