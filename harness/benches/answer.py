"""What a model answers, as one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_DEEP = 8  # levels


def first_tensor(found: Any) -> Tensor:
    """Return the first floating tensor of what a model answers: itself, in a tuple, a mapping or a dataclass.

    Raises:
        TypeError: it holds none.
    """
    first = next(_tensors(found), None)
    if first is None:
        raise TypeError(f"run returned {type(found).__name__}, but should return a tensor, or what holds one")
    return first


def _tensors(found: Any, depth: int = 0) -> Iterator[Tensor]:
    import torch

    if isinstance(found, torch.Tensor):
        if found.is_floating_point() or found.is_complex():
            yield torch.view_as_real(found) if found.is_complex() else found
    elif depth < _DEEP:
        held = vars(found) if dataclasses.is_dataclass(found) and not isinstance(found, Mapping) else found
        for part in held.values() if isinstance(held, Mapping) else held if isinstance(held, (tuple, list)) else ():
            yield from _tensors(part, depth + 1)
