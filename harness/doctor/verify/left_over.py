"""What a layer shows beside a LoRA's own product: another update, or the magnitudes alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from harness.doctor.verify.layer import DoraLayer, MergedLayer
from harness.doctor.verify.measurement import FAR, MOSTLY, MergeMeasurement
from harness.doctor.verify.rows import runs_of
from harness.doctor.verify.vote import Flags

ROWS_LEFT = 128  # of a layer, from which the rank of what is left is taken
_COLUMNS_LEFT, _LEAST_ROWS = 1024, 24
_OWN = 1e-4  # relative; singular values of this LoRA's update
_COLUMN = 0.5  # of a column's elements, and of all that are off
_BEYOND = 0.02  # of the energy of what is left, beyond its rank
_NONE_OF_IT = 0.1  # of the base
_ABOVE = 5.0  # medians; singular values of noise lie below


def left_over(layer: MergedLayer, measured: MergeMeasurement) -> str | None:
    """Say that what else was done to a layer is of low rank, as another LoRA's update is, or in few elements."""
    if measured.state not in ("mixed", "unexplained"):
        return None
    if abs(measured.base) < _NONE_OF_IT:
        return "the base is not in it: another model's weights stand below"
    if measured.base != 1:
        return f"the base is in it {measured.base:.4g} times: another scale of its weights, or of its codes"
    seen = layer.window(0, min(layer.rows, ROWS_LEFT))
    scale = measured.scale if measured.state == "mixed" else 0.0
    rest = seen.after - seen.before - scale * seen.product
    if measured.state == "mixed" and measured.explained >= MOSTLY:
        return _where(np.abs(rest) > FAR * seen.half)
    if min(rest.shape) < _LEAST_ROWS or not np.isfinite(rest).all():
        return None
    _, sizes, own = np.linalg.svd(seen.product, full_matrices=False)
    own = own[sizes > _OWN * sizes.max()]  # the scale is not exact: what it leaves of this LoRA counts for nothing
    rest = rest - rest @ own.T @ own
    values = np.linalg.svd(rest[:, :_COLUMNS_LEFT], compute_uv=False)
    rank = int((values > _ABOVE * np.median(values)).sum())
    rounding = float(np.square(seen.half[:, :_COLUMNS_LEFT], dtype=np.float64).sum())
    beyond = float(np.square(values[rank:], dtype=np.float64).sum())
    if not 0 < rank <= len(values) / 3 or beyond > max(_BEYOND * float(np.square(values).sum()), rounding):
        return None
    return f"what else was done is of rank {rank}, as another LoRA (pass it with a second --lora) or formula leaves it"


def _where(off: Flags) -> str | None:
    """Say in which columns the elements are that are `off`, or how many there are: no update of low rank has so few."""
    columns = off.mean(axis=0) > _COLUMN
    if not off.any():
        return None
    if off[:, columns].sum() < _COLUMN * off.sum():
        return f"something else was done to {off.mean():.2%} of its elements, or nothing at all"
    start, stop = runs_of(columns)[0]
    more = " and others" if len(runs_of(columns)) > 1 else ""
    which = f"column {start}" if stop - start == 1 else f"columns {start} to {stop - 1}"
    return f"something else was done to {which}{more}, or nothing at all"


def without_product(
    layer: MergedLayer, measured: MergeMeasurement, *, due: bool
) -> tuple[MergeMeasurement, tuple[str, str] | None]:
    """Return what a layer shows to which nothing is added; of DoRA the magnitudes may still be `due`."""
    if isinstance(layer, DoraLayer) and due:
        if measured.changed:
            said = layer.fault(0.0)
            return replace(measured, state="replaced", replaces="magnitudes alone"), ("LH304", said) if said else None
        if layer.is_due():
            return replace(measured, state="not merged"), None
    return replace(measured, state="replaced", replaces="nothing to merge, and nothing changed"), None
