"""What else of a loaded model is not as it was: modes, biases, norms, what layers answer to zeros."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import equal  # bound here: a subject may replace torch's own

from harness.benches import Bench
from harness.checks.unloaded import base_offsets, base_state, base_types, same
from harness.measure.compare import norm
from harness.measure.tolerance import UNIT_ROUNDOFF

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def training(bench: Bench, model: torch.nn.Module) -> Iterator[str]:
    """Yield what is in training mode: modules of the base model, which were not, and dropouts that are on."""
    before = base_types(bench)
    for name, module in model.named_modules():
        dropout = module.training and "Dropout" in type(module).__name__ and getattr(module, "p", 0) != 0
        if module.training and (dropout or before.get(_base_name(name)) is type(module)):
            yield f"{name} (dropout)" if dropout else name or "the model itself"


def other_state(bench: Bench, model: torch.nn.Module, dtype: str, bias: bool) -> tuple[str, ...]:
    """Return the parameters and buffers that are not measured (biases, norms) and not what they were.

    Beside codes stand their scales, which are a part of the weight.
    """
    expected = base_state(bench, dtype, bias)
    found = {base: value for name, value in _state(model) if (base := _base_name(name)) in expected}
    return tuple(n for n, value in found.items() if not same(value.cpu().to(expected[n].dtype), expected[n]))


def _state(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer, those that stand in two places twice."""
    for path, module in model.named_modules(remove_duplicate=False):
        start = f"{path}." if path else ""
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield f"{start}{name}", value


def shifted(bench: Bench, constants: Mapping[str, Tensor], dtype: str) -> Iterator[str]:
    """Yield the layers whose answer to zeros changed: a bias is lost or scaled, or a hook adds to the output."""
    before = base_offsets(bench, dtype)
    for name, value in constants.items():
        off = 0.0 if value is before[name] or equal(value, before[name]) else norm(value - before[name])
        if off > 8 * UNIT_ROUNDOFF[dtype] * norm(before[name]):
            yield f"{name}.bias"


@lru_cache(1 << 14)
def _base_name(name: str) -> str:
    return re.sub(r"(\.base_layer)+\.", ".", name.removeprefix("base_model.model."))
