"""Quantised layers in a merge: which of them can be judged, and a merge stored in fp8 codes in the codes' own units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.doctor.verify.layer import MergedLayer
from harness.doctor.verify.measurement import MergeMeasurement
from harness.doctor.verify.pairing import Weights, cut
from harness.doctor.verify.products import Total
from harness.doctor.verify.vote import DTYPES

_CLEAR = ("merged", "partly", "two roundings", "twice")  # states that no rounding of a quantised base explains


def obstacle(tensor: str, base: Weights, merged: Weights) -> str | None:
    """Say why quantisation keeps a layer from being judged; None when it does not."""
    for store in (base, merged):
        if why := store.store.unreadable(store.owner(tensor)):
            return why
    scheme = merged.scheme(tensor)
    if scheme is None or one_step(merged, tensor) is not None:
        return None
    return f"a merge stored as {scheme.name} is rounded to codes that have no one step"


def one_step(store: Weights, tensor: str) -> float | None:
    """Return the one scale of a layer that is stored in floating-point codes; None when it is stored otherwise."""
    scheme = store.scheme(tensor)
    if scheme is None or scheme.step is None or store.dtype(tensor) not in DTYPES:
        return None
    step = scheme.step(0, 1)
    whole = scheme.step(0, scheme.shape[0])
    return float(step) if whole.numel() == 1 and bool(step.isfinite() & (step > 0)) else None


def in_codes(layer: MergedLayer, step: float) -> MergedLayer:
    """Return the layer with everything divided by the one scale of W': its codes are then what was rounded."""
    return replace(
        layer,
        base=Divided(**vars(layer.base), step=step),
        merged=Codes(**vars(layer.merged)),
        product=Total(((layer.product, 1 / step),)),
    )


def told(measured: MergeMeasurement) -> bool:
    """Tell whether a measurement holds although W of the base is known through its codes only."""
    return measured.state in _CLEAR


@dataclass
class Divided(Weights):
    """Weights in units of `step`."""

    step: float = 1.0

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) as float32."""
        return super().rows(name, start, stop).float() / self.step

    def chunks(self, name: str) -> Callable[[int, int], Tensor]:
        """Return what reads rows."""
        return partial(self.rows, name)

    def dtype(self, name: str) -> str:
        """Return that of the real weights."""
        return "float32"


@dataclass
class Codes(Weights):
    """Weights as they are stored."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the codes."""
        parts = [self.store.stored_rows(*piece) for piece in cut(self._pieces(name), start, stop, self._stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def chunks(self, name: str) -> Callable[[int, int], Tensor]:
        """Return what reads rows."""
        return partial(self.rows, name)
