"""The layers of a model as a LoRA file names them: its own, or q, k and v taken apart or put together.

A LoRA trained on one topology can be right on the other: what it adds to `to_q` belongs in the first rows of `to_qkv`.
A view gathers the rows of the model's layers under the names of the file, so everything is measured there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from harness.benches.layer import Layer

if TYPE_CHECKING:
    from torch import Tensor

Piece = tuple[str, slice]
Pieces = tuple[Piece, ...]
"""Rows of the model's layers, stacked in this order."""


@dataclass(frozen=True, eq=False)
class View:
    """Layers by name: those a LoRA may target are `lora_layers`, and `fused` says which stack several projections.

    `pieces` says where the rows of a layer are in the model, for the layers that are not the model's own.
    """

    name: str
    layers: Mapping[str, Layer]
    lora_layers: tuple[str, ...]
    fused: tuple[tuple[str, int], ...] = ()
    pieces: Mapping[str, Pieces] = field(default_factory=dict)

    def slices(self, layer: str) -> tuple[slice, ...]:
        """The row ranges of `layer` that hold separate projections; one range for an ordinary layer."""
        if layer in self.pieces:
            return _stacked([_length(rows) for _, rows in self.pieces[layer]])
        parts = next((count for suffix, count in self.fused if layer.endswith(suffix)), 1)
        return _stacked([self.layers[layer].rows // parts] * parts)

    def gather(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of this view from those of the model's layers."""
        import torch

        own = {name: torch.cat([weights[layer][rows] for layer, rows in p]) for name, p in self.pieces.items()}
        return {name: own[name] if name in own else weights[name] for name in self.layers}


def regroup(view: View, pieces: Mapping[str, Pieces]) -> View:
    """Return `view` with the layers of `pieces` in the place of those they are made of."""
    gone = {layer for parts in pieces.values() for layer, _ in parts}
    made = {name: _joined(view, parts) for name, parts in pieces.items()}
    kept = {name: layer for name, layer in view.layers.items() if name not in gone}
    targets = tuple(name for name in view.lora_layers if name not in gone)
    return replace(view, layers={**made, **kept}, lora_layers=(*made, *targets), pieces=dict(pieces))


def _joined(view: View, parts: Pieces) -> Layer:
    first = view.layers[parts[0][0]]
    return replace(first, rows=sum(_length(rows) for _, rows in parts))


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _stacked(lengths: list[int]) -> tuple[slice, ...]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
