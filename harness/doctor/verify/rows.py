"""Every row of a layer against its rounding: sums in one quick pass, then each odd row element by element."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from harness.doctor.verify.vote import Array, Flags, half_step, work_dtype

if TYPE_CHECKING:
    from harness.doctor.verify.layer import MergedLayer, Sample

_LOOKED_AT = 32  # columns of every row that are compared element by element in the quick pass
_TOO_FAR = 0.6  # mean square of error / allowance; 1/3 where errors spread evenly
_GROSS = 8.0  # allowances: no rounding leaves one element so far off
_LEAST = 5  # elements of a row that must be off, and as a share of its columns, or of those that should change
_SHARE, _SHARE_OF_CHANGES = 0.03, 0.2
_CLEAR = 1.25  # half steps; smaller updates may fall either way when the delta is rounded too
_POOLED = 20  # elements of a run of unchanged rows that should have changed
_SIGMAS = 5.0
_OFF_SURVIVAL = 0.25  # relative
_CHUNK = 1 << 20  # elements
_SIZES = 2.0 ** np.arange(-6, 7)  # updates, in half steps, at which survival is tried


@dataclass(frozen=True)
class Rounding:
    """What an element of W' may differ from W + scale * P: half a step of `dtype`, and what rounding A, B and P adds.

    `typical` is the root mean square of P; `slack` widens everything (two roundings).
    """

    scale: float
    dtype: str
    roundoff: float
    typical: float
    slack: float = 1.0

    @classmethod
    def of(cls, sample: Sample, scale: float, slack: float = 1.0) -> Rounding:
        """Return that of the layer a sample was taken from."""
        typical = float(np.sqrt(np.mean(np.square(sample.product, dtype=np.float64)))) if sample.product.size else 0.0
        return cls(scale, sample.dtype, sample.roundoff, typical, slack * sample.blur)

    def allowance(self, product: Array, half: Array) -> Array:
        """Return what each element may be off."""
        kind, factor = product.dtype.type, 2 * self.roundoff * abs(self.scale)
        found = np.abs(product)
        found *= kind(factor)
        found += kind(factor * self.typical)
        found += half if self.slack == 1 else half * kind(self.slack)
        return found


@dataclass(frozen=True)
class RowSums:
    """<ΔW, P>, <P, P> and |ΔW|^2 of every row, and how its elements lie in what rounding allows, each [rows].

    `changed` says in which rows anything did.

    `misfit` is the mean square of error / allowance, `allowed` that of the allowance; both of some columns. `exact` is
    the relative error of the sums.
    """

    overlap: Array
    product: Array
    energy: Array
    changed: Flags
    misfit: Array
    allowed: Array
    exact: float


@dataclass(frozen=True)
class Window:
    """W, W', P and half a step of W' in some rows, and the elements that are not the base's: [rows, columns]."""

    before: Array
    after: Array
    product: Array
    half: Array
    changed: Flags


@dataclass
class Looks:
    """Collects `misfit` and `allowed` from chunks of rows as they pass: old, new and the product of some columns."""

    rounding: Rounding
    columns: slice
    misfit: list[Array] = field(default_factory=list)
    allowed: list[Array] = field(default_factory=list)

    @classmethod
    def at(cls, rounding: Rounding, columns: int) -> Looks:
        """Look at columns spread over all of them."""
        step = max(1, columns // _LOOKED_AT)
        return cls(rounding, slice(step // 2, None, step))

    def take(self, before: Tensor, after: Tensor, product: Tensor) -> None:
        """Compare a chunk, [rows, some columns] each."""
        import torch

        work = torch.float64 if work_dtype(self.rounding.dtype) is np.float64 else torch.float32
        old, new, update = (part.to(work).numpy() for part in (before, after, product))
        self.compare(old, new, update, half_step(new, self.rounding.dtype))

    def compare(self, before: Array, after: Array, product: Array, half: Array) -> None:
        """Compare arrays, with half a step of each element."""
        with np.errstate(all="ignore"):
            allowance = self.rounding.allowance(product, half)
            error = after - before
            error -= product * product.dtype.type(self.rounding.scale)
            error /= np.maximum(allowance, product.dtype.type(1e-30))
            columns = error.shape[1]
            self.misfit.append(np.einsum("ij,ij->i", error, error) / columns)
            self.allowed.append(np.einsum("ij,ij->i", allowance, allowance) / columns)


def rows_of(start: int, stop: int) -> str:
    """Name the rows [start, stop)."""
    return f"row {start}" if stop - start == 1 else f"rows {start} to {stop - 1}"


@dataclass(frozen=True)
class Damage:
    """Rows [start, stop) that are not what the merge makes of them, and how: unmerged, non-finite, zero or other.

    `scale` is the factor on P that explains them, NaN where none does.
    """

    start: int
    stop: int
    kind: str
    scale: float = float("nan")

    @property
    def rows(self) -> tuple[int, int]:
        """(start, stop)."""
        return self.start, self.stop

    def text(self) -> str:
        """Say it in few words."""
        rows = rows_of(self.start, self.stop)
        how = (
            f"scale {self.scale:.3g}"
            if np.isfinite(self.scale)
            else {"other": "other values"}.get(self.kind, self.kind)
        )
        return f"{rows} ({how})"


def runs_of(flags: Flags) -> list[tuple[int, int]]:
    """Return the (start, stop) of every run of True."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def damaged_rows(
    layer: MergedLayer, sample: Sample, sums: RowSums, rounding: Rounding, wrong_share: float
) -> list[Damage]:
    """Return the rows that rounding does not explain.

    `wrong_share` is the share of elements that are off in a sample of the layer: a row must be worse.
    """
    broken = ~np.isfinite(sums.energy)
    suspects = _suspects(layer, sample, sums, rounding) & ~broken
    kinds = np.full(layer.rows, "", dtype=object)
    kinds[broken] = "non-finite"
    scales = np.full(layer.rows, np.nan)
    missing = np.zeros(layer.rows)
    for start, stop in _chunks(suspects, layer.columns):
        found = _compared(layer, (start, stop), rounding, wrong_share)
        kinds[start:stop], scales[start:stop], missing[start:stop] = found
    for start, stop in runs_of(~sums.changed):
        if missing[start:stop].sum() > _POOLED:
            kinds[start:stop] = "unmerged"
    return list(_grouped(kinds, scales))


def _suspects(layer: MergedLayer, sample: Sample, sums: RowSums, rounding: Rounding) -> Flags:
    """Return the rows that the sums do not clear."""
    scale, columns = rounding.scale, layer.columns
    with np.errstate(all="ignore"):
        residual = sums.energy - 2 * scale * sums.overlap + scale**2 * sums.product
        floor = sums.exact * (sums.energy + scale**2 * sums.product)
        loose = 1 if layer.on_grid else 2  # W was rounded too before it was subtracted
        far = residual > loose * _TOO_FAR * columns * sums.allowed + floor
        far |= ~(sums.misfit <= _TOO_FAR)
        size = np.sqrt(scale**2 * sums.product / columns)
        still = ~sums.changed & (5 * size > np.sqrt(sums.allowed))
        due = _survival(sample, size / np.sqrt(sums.allowed)) * scale * sums.product
        doubt = _SIGMAS * np.sqrt(sums.product * sums.allowed / 3) + _OFF_SURVIVAL * np.abs(due)
        lost = np.abs(sums.overlap - due) > doubt
    found: Flags = far | still | lost
    return found


def _survival(sample: Sample, sizes: Array) -> Array:
    """Return the share of an update that rounding leaves, for updates of these sizes in half steps.

    Tried on the sampled weights, which may lie on the grid of the merge (small updates then vanish) or between.
    """
    kind = sample.product.dtype.type
    with np.errstate(all="ignore"):
        unit = sample.product / np.sqrt(np.square(sample.product, dtype=np.float64).mean(axis=1, keepdims=True))
        unit = (unit * np.sqrt(np.square(sample.half, dtype=np.float64).mean(axis=1, keepdims=True))).astype(kind)
    kept = np.isfinite(unit).all(axis=1) & np.isfinite(sample.base).all(axis=1)
    unit, base = unit[kept], sample.base[kept]
    whole = float(np.square(unit, dtype=np.float64).sum())
    if not whole:
        return np.ones_like(sizes)
    start = sample.rounded(base)
    shares = [float(((sample.rounded(base + unit * kind(x)) - start) * unit).sum()) / (x * whole) for x in _SIZES]
    found: Array = np.interp(np.log(np.maximum(sizes, 1e-30)), np.log(_SIZES), shares)
    return found


def _chunks(flags: Flags, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // max(columns, 1))
    for start, stop in runs_of(flags):
        yield from ((first, min(first + step, stop)) for first in range(start, stop, step))


def _compared(
    layer: MergedLayer, run: tuple[int, int], rounding: Rounding, wrong_share: float
) -> tuple[Sequence[str], Array, Array]:
    """Return the kind of damage of each row of a run (empty: none), the scale that explains it, the missing changes."""
    seen = layer.window(*run)
    update, columns = seen.product * rounding.scale, layer.columns
    allowance = rounding.allowance(seen.product, seen.half)
    error = np.abs(seen.after - seen.before - update)
    wrong = error > allowance
    count, usual = wrong.sum(axis=1), wrong_share * columns
    busy = np.maximum(seen.changed.sum(axis=1), (np.abs(update) > _CLEAR * seen.half).sum(axis=1))
    bad = (count >= min(_LEAST, columns)) & (count > 2 * usual + 6 * np.sqrt(usual))
    bad &= (count > _SHARE * columns) | (count > _SHARE_OF_CHANGES * busy)
    bad |= (error > _GROSS * allowance).any(axis=1)
    same = ~seen.changed.any(axis=1)
    kinds = np.where(~bad, "", np.where(same, "unmerged", np.where((seen.after == 0).all(axis=1), "zero", "other")))
    return list(kinds), _scales(seen, allowance), (wrong & ~seen.changed).sum(axis=1)


def _scales(seen: Window, allowance: Array) -> Array:
    """Return the factor on P of each row, NaN where a multiple of P does not explain the row."""
    change = seen.after - seen.before
    with np.errstate(all="ignore"):
        factor = (change * seen.product).sum(axis=1) / np.square(seen.product).sum(axis=1)
        left = np.square(change - factor[:, None] * seen.product).mean(axis=1)
        found: Array = np.where(left <= np.square(allowance).mean(axis=1), factor, np.nan)
    return found


def _grouped(kinds: np.ndarray[Any, Any], scales: Array) -> Iterator[Damage]:
    for kind in ("non-finite", "zero", "unmerged", "other"):
        for start, stop in runs_of(kinds == kind):
            scale = float(np.median(scales[start:stop])) if kind == "other" else float("nan")
            yield Damage(start, stop, kind, scale)
