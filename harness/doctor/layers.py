"""Which kind of layer the update of a module makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.changes import Piece
from harness.doctor.verify.dora import DoraLayer
from harness.doctor.verify.layer import Layer, ProductLayer
from harness.doctor.verify.products import Product

if TYPE_CHECKING:
    from harness.files import LoraAdapter


def layer_of(adapter: LoraAdapter, piece: Piece, base: Checkpoint, merged: Checkpoint) -> Layer | None:
    """Return the layer of a piece that has a product and a tensor, or None when their shapes do not fit."""
    assert piece.product is not None
    assert piece.tensor is not None
    module = adapter.modules[piece.module]
    weight = piece.scaled and piece.name == piece.module
    if weight and {"A", "B"} <= set(module.keys) and not {"mid", "magnitude"} & set(module.keys):
        return Layer.of(adapter, piece.module, piece.tensor, base, merged)
    product = _fitted(adapter, piece, base)
    if product is None:
        return None
    first = next(role for role in module.keys if role != "alpha")
    nothing = torch.empty(0, 0)
    dtype = str(adapter.part(piece.module, first).dtype).removeprefix("torch.")
    parts = (piece.module, piece.tensor, base, merged, nothing, nothing, dtype, product)
    if not weight or "magnitude" not in module.keys:
        return ProductLayer(*parts)
    magnitude = adapter.part(piece.module, "magnitude")
    axis = _axis(tuple(magnitude.shape), product.shape, adapter.format)
    return None if axis is None else DoraLayer(*parts, magnitude, axis)


def _fitted(adapter: LoraAdapter, piece: Piece, base: Checkpoint) -> Product | None:
    assert piece.product is not None
    assert piece.tensor is not None
    product, info = piece.product(), base.info(piece.tensor)
    shape = info.shape[0] if info.shape else 1, info.elements // max(info.shape[0] if info.shape else 1, 1)
    turned = bool(adapter.config.get("fan_in_fan_out"))
    if product.shape[::-1] == shape and (turned or product.shape != shape):
        return product.turned()
    return product if product.shape == shape else None


def _axis(magnitude: tuple[int, ...], shape: tuple[int, int], format: str) -> int | None:
    """Return the axis that a magnitude runs along: 0 the rows, 1 the columns; None when it fits neither.

    kohya's `dora_scale` says it by its shape, [out, 1] or [1, in]; PEFT's runs along the outputs.
    """
    count = int(np.prod(magnitude))
    fits = count == shape[0], count == shape[1]
    if all(fits):
        return int(format != "peft" and len(magnitude) > 1 and magnitude[0] == 1)
    return fits.index(True) if any(fits) else None
