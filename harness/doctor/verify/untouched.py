"""The tensors of a checkpoint that a LoRA does not name: they must be what they were."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.doctor.checkpoint import Checkpoint

_WHOLE_BYTES = 1 << 16  # read completely up to this size
_ROWS = 4


@dataclass(frozen=True)
class Untouched:
    """What was compared: how many tensors, which of them changed, and which names only one side has."""

    compared: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def is_other_model(self) -> bool:
        """True when most tensors differ: the merge did not start from this base."""
        return self.compared > 1 and 2 * len(self.changed) > self.compared


def compare_untouched(
    base: Checkpoint, merged: Checkpoint, touched: Container[str], *, full: bool = False
) -> Untouched:
    """Compare every tensor that is not in `touched`: a few rows of each, everything with `full`.

    A tensor stored in another dtype is unchanged when it is the base's rounded to that dtype.
    """
    common = [name for name in base.names if name in merged.names]
    fits = {name: base.stored(name).shape == merged.stored(name).shape for name in common}
    others = [name for name in common if fits[name] and name not in touched]
    return Untouched(
        compared=len(others),
        changed=tuple(name for name in others if _differs(base, merged, name, full)),
        missing=tuple(name for name in base.names if name not in merged.names),
        extra=tuple(name for name in merged.names if name not in base.names),
        reshaped=tuple(name for name in common if not fits[name]),
    )


def _differs(base: Checkpoint, merged: Checkpoint, name: str, full: bool) -> bool:
    info = base.stored(name)
    rows = info.shape[0] if info.shape else 1
    if rows == 0:
        return False
    size = max(1, (info.end - info.start) // rows)
    step = rows if info.end - info.start <= _WHOLE_BYTES else max(1, _WHOLE_BYTES * 16 // size) if full else 1
    starts = range(0, rows, step) if full or step == rows else [rows * part // _ROWS for part in range(_ROWS)]
    for start in starts:
        before, after = (store.stored_rows(name, start, min(start + step, rows)) for store in (base, merged))
        if not torch.equal(_bits(before.to(after.dtype)), _bits(after)):
            return True
    return False


def _bits(tensor: Tensor) -> Tensor:
    """View the numbers as bytes, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
