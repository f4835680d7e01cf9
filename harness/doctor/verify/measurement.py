"""What was done to one layer: merged once and rounded, in part, twice, not at all, or changed by something else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from harness.doctor.verify.layer import BLOCKS, TWO_ROUNDINGS, Sample
from harness.doctor.verify.rows import Damage, Rounding, runs_of
from harness.doctor.verify.vote import Array, Flags, Vote, bounds, vote, vote_within

State = Literal[
    "merged", "partly", "damaged", "twice", "two roundings", "not merged", "hidden", "mixed", "unexplained",
    "not finite", "replaced",
]  # fmt: skip

EXPLAINED = 0.97
MOSTLY = 0.8  # of the elements: what the others are off by is no doubt of the scale
_AS_ONCE = 0.01  # of the scale: so near, two merges make what one should
_OF_CHANGED = 0.8  # least share of the changed elements that the scale must explain
_MISSED = 5  # elements that should have changed and did not
_RESOLVED = 8.0  # half steps; larger updates are rounded without bias
ALIGNED = 0.02  # share of ||ΔW||^2 along B @ A below which this LoRA is not in it
FAR = 3.0  # allowances: what is rounded twice, or to either side by chance, is off by two at most
_STRAYS, _STRAY_SHARE = 5, 3e-4  # elements so far off, and as a share of all, that no rounding made them
_LOST, _FEW = 0.2, 0.25  # share of a row that is far off, and of the rows: damage to these, not to the layer
_SIGMAS, _AWAY, _MUCH = 5.0, 0.01, 0.3  # standard errors; shares of the elements, of what remains


@dataclass(frozen=True)
class MergeMeasurement:
    """What one layer shows.

    `scale` is the factor on B @ A that was used and lies in `interval`; `coverage` is the share of elements it
    explains to the last bit, `explained` the share it explains when the delta itself was rounded too. `overlap` and
    `product` are <ΔW, BA> and <BA, BA> over the rows seen, `aligned` the share of ||ΔW||^2 along B @ A.
    `unmerged` are the rows, as (start, stop), in which nothing happened although something should have; `damaged` are
    the others that are not what the merge makes of them. `seen` is the share of the rows that was read. `replaces` says
    what a tensor was compared with where no scale is measured; it is then `replaced` when it is right. `base` is what
    the base was multiplied by, 1 where that lies within what rounding leaves open.
    """

    state: State
    scale: float
    interval: tuple[float, float]
    coverage: float
    explained: float
    changed: float
    overlap: float
    product: float
    aligned: float
    elements: int
    rows: int
    unmerged: tuple[tuple[int, int], ...] = ()
    damaged: tuple[Damage, ...] = ()
    seen: float = 1.0
    replaces: str = ""
    base: float = 1.0

    @property
    def survived(self) -> float | None:
        """Share of the effect that rounding left: the projection over the scale; None when nothing was merged."""
        if self.scale == 0 or self.product == 0 or self.state in ("not merged", "hidden", "unexplained"):
            return None
        return self.overlap / self.product / self.scale


def voted(sample: Sample, window: tuple[float, float] | None = None) -> Vote:
    """Vote among the blocks in which anything changed: those without a merge would all vote for 0."""
    kept = np.isin(sample.block, np.flatnonzero(_by_block(sample, sample.changed)))
    keep = kept if kept.any() else np.ones_like(kept)
    low, high = bounds(sample.change[keep].ravel(), sample.product[keep].ravel(), sample.half[keep].ravel())
    if window and all(map(np.isfinite, window)):
        return vote_within(low, high, window)
    return vote(low, high)


def _by_block(sample: Sample, flags: Flags) -> np.ndarray[Any, np.dtype[np.int_]]:
    return np.bincount(sample.block, weights=flags.sum(axis=1)).astype(int)


def judge(sample: Sample, found: Vote, expected: float, least_drift: float) -> MergeMeasurement:
    """Say what happened to the sampled rows, given the scale most of them voted for."""
    nonzero = sample.product != 0
    if not (sample.changed & nonzero).any():
        return untouched(sample, found, expected)
    scale = found.scale
    error, allowance = off(sample, scale)
    if found.coverage < EXPLAINED and not _are_strays(error > FAR * allowance):  # which no regression should follow
        scale = _refined(sample, scale)
        error, allowance = off(sample, scale) if scale != found.scale else (error, allowance)
    wrong = error > allowance
    missed = wrong & nonzero & ~sample.changed
    blocks = (_by_block(sample, missed) >= _MISSED) & (_by_block(sample, sample.changed) == 0)
    alone = (missed.sum(axis=1) >= _MISSED) & ~sample.changed.any(axis=1)
    rest, far = ~(blocks[sample.block] | alone), error > FAR * allowance
    lost = rest & (far.mean(axis=1) > _LOST)
    rest &= ~lost if lost.mean() <= _FEW else True
    seen = sample.of(rest)
    made = MergeMeasurement(
        state="merged",
        scale=scale,
        interval=(min(found.low, scale), max(found.high, scale)),
        coverage=found.coverage,
        explained=float((~wrong[rest]).mean()),
        changed=float(seen.changed.mean()),
        overlap=_dot(seen.change, seen.product),
        product=_dot(seen.product, seen.product),
        aligned=aligned(seen.change, seen.product),
        elements=sample.product.size,
        rows=sample.rows,
        unmerged=_rows(np.flatnonzero(blocks), sample.index[alone & ~blocks[sample.block]], sample),
    )
    found_rows = [Damage(int(row), int(row) + 1, "other") for row in sample.index[lost]]
    if _are_strays(far[rest]):
        made = replace(made, state="mixed") if made.explained >= MOSTLY else _mixed(seen, made)
    else:
        made = _beside(_classified(seen, made, error[rest], wrong[rest], expected), found_rows)
    return _on_its_base(made, seen, least_drift)


def _on_its_base(made: MergeMeasurement, sample: Sample, least: float) -> MergeMeasurement:
    """Return `made`, `mixed` where the base has another scale in the merge: (1 + g) W + s P, g beyond `least`.

    g is <R, W> / <W, W> of the remainder R = W' - W - s P. What remains leaves in it five standard errors, rounding a
    bias of the square of half a step against W, and an s that is not exact its own share along P.
    """
    weight = _dot(sample.base, sample.base)
    if made.state not in ("merged", "partly", "two roundings", "mixed") or not weight:
        return made
    rest = sample.change - sample.product * sample.product.dtype.type(made.scale)
    drift, along = _dot(rest, sample.base) / weight, abs(_dot(sample.product, sample.base)) / weight
    blurred = rest * sample.base
    noise = (_SIGMAS * math.sqrt(_dot(blurred, blurred)) + _dot(sample.half, sample.half)) / weight
    unsure = made.interval[1] - made.interval[0] + 2 * sample.roundoff * abs(made.scale)
    if abs(drift) <= least + noise + unsure * along or _is_cut(rest, sample, drift * weight):
        return made
    if made.state == "mixed" and drift**2 * weight < _MUCH * _dot(rest, rest):
        return made
    return replace(made, state="mixed", base=1 + drift)


def _is_cut(rest: Array, sample: Sample, drift: float) -> bool:
    """Tell whether the sum was rounded toward 0, as by cutting off bits: no element is larger than before that."""
    away = float((rest * np.sign(sample.base + sample.change) > 0).mean())
    return drift < 0 and away < _AWAY and -drift <= 1.25 * _dot(sample.half, np.abs(sample.base))


def _beside(made: MergeMeasurement, damaged: list[Damage]) -> MergeMeasurement:
    """Return what was found of a layer, beside damaged rows that were left out of it."""
    if not damaged or made.state not in ("merged", "partly", "two roundings"):
        return made
    return replace(made, state="damaged", damaged=tuple(damaged))


def off(sample: Sample, scale: float) -> tuple[Array, Array]:
    """Return how far each element is from what a merge at `scale` makes of it, and how far rounding may leave it."""
    with np.errstate(all="ignore"):
        error = np.abs(sample.change - sample.product * sample.change.dtype.type(scale))
        return error, Rounding.of(sample, scale).allowance(sample.product, sample.half)


def _are_strays(far: Flags) -> bool:
    return bool(far.sum() >= _STRAYS and far.mean() > _STRAY_SHARE)


def has_strays(sample: Sample, scale: float) -> bool:
    """Tell whether elements are further off than any rounding leaves them, however few they are."""
    error, allowance = off(sample, scale)
    return _are_strays(error > FAR * allowance)


def _classified(
    sample: Sample, made: MergeMeasurement, error: Array, wrong: Flags, expected: float
) -> MergeMeasurement:
    """Return `made` with its state, and with the projection for a scale where no scale explains the elements."""
    if made.explained >= EXPLAINED and _mean(~wrong, sample.changed) >= _OF_CHANGED:
        return replace(made, state="partly") if made.unmerged else made
    for once in (expected, made.scale / 2):
        if _merged_twice(sample, once):
            if abs(2 * once - expected) <= _AS_ONCE * abs(expected):  # in two steps, or rounded to those of a block
                return replace(made, state="partly" if made.unmerged else "two roundings")
            return replace(made, state="twice", scale=2 * once, interval=(2 * once, 2 * once))
    near = error <= Rounding.of(sample, made.scale, TWO_ROUNDINGS).allowance(sample.product, sample.half)
    if near.mean() >= 0.9 and _mean(near, sample.changed) >= 0.7:
        return replace(made, state="partly" if made.unmerged else "two roundings")
    return _mixed(sample, made)


def _mixed(sample: Sample, made: MergeMeasurement) -> MergeMeasurement:
    """Return what was merged with other changes besides, or what no multiple of the product explains."""
    if made.aligned > ALIGNED and made.interval[1] - made.interval[0] < 0.1 * abs(made.scale):
        return replace(made, state="mixed")
    scale, doubt = _projected(sample, made)
    state: State = "mixed" if made.aligned > ALIGNED else "unexplained"
    return replace(made, state=state, scale=scale, interval=(scale - doubt, scale + doubt))


def _merged_twice(sample: Sample, once: float) -> bool:
    """Tell whether merging at `once`, rounding, and doing both again gives these very elements."""
    delta = sample.product * sample.product.dtype.type(once)
    again = sample.rounded(sample.rounded(sample.base + delta) + delta)
    same = again == sample.base + sample.change
    return bool(same.mean() >= 0.7 and _mean(same, sample.changed) >= 0.7)


def _projected(sample: Sample, made: MergeMeasurement) -> tuple[float, float]:
    """Return <ΔW, p> / <p, p> and four standard errors of it."""
    left_over = _dot(sample.change, sample.change) * (1 - made.aligned) / max(made.product, 1e-300)
    return made.overlap / max(made.product, 1e-300), 4 * math.sqrt(max(left_over, 0.0) / sample.product.size)


def aligned(change: Array, product: Array) -> float:
    """Return the share of ||ΔW||^2 along a product."""
    return _dot(change, product) ** 2 / max(_dot(change, change) * _dot(product, product), 1e-300)


def untouched(sample: Sample, found: Vote, expected: float) -> MergeMeasurement:
    """Nothing changed where the product is not 0: not merged, or too weak to be seen in this dtype.

    Where rows changed although their product is 0, something else did that.
    """
    product = _dot(sample.product, sample.product)
    hidden = found.low <= expected <= found.high or product == 0
    state: State = "hidden" if hidden else "not merged"
    return MergeMeasurement(
        state="unexplained" if _is_edited(sample) else state,
        scale=0.0,
        interval=(found.low, found.high),
        coverage=found.coverage,
        explained=1.0,
        changed=float(sample.changed.mean()),
        overlap=0.0,
        product=product,
        aligned=0.0,
        elements=sample.product.size,
        rows=sample.rows,
    )


def _is_edited(sample: Sample) -> bool:
    """Tell whether rows changed by more than rounding, where no scale of the product is in question."""
    with np.errstate(invalid="ignore"):
        wrong = np.abs(sample.change) > Rounding.of(sample, 0.0, TWO_ROUNDINGS).allowance(sample.product, sample.half)
    return bool((wrong.mean(axis=1) > 1 - EXPLAINED).any())


def _rows(blocks: np.ndarray[Any, Any], alone: np.ndarray[Any, Any], sample: Sample) -> tuple[tuple[int, int], ...]:
    """Return the rows of whole blocks, and those of other blocks that stand alone, in runs."""
    count, found = min(BLOCKS, sample.rows), np.isin(np.arange(sample.rows), alone)
    for block in blocks:
        found[sample.rows * block // count : sample.rows * (block + 1) // count] = True
    return tuple(runs_of(found))


def _refined(sample: Sample, scale: float) -> float:
    """Return the regression over the updates of many steps, which rounding does not bias; `scale` if there are few."""
    if not np.isfinite(scale):
        return scale
    clear = np.abs(sample.product) * abs(scale) > _RESOLVED * sample.half
    clear &= sample.changed
    if clear.sum() < 500:
        return scale
    product = sample.product[clear]
    found = _dot(sample.change[clear], product) / _dot(product, product)
    return found if abs(found - scale) <= 0.05 * abs(scale) else scale


def _mean(right: Flags, among: Flags) -> float:
    """Return the share of `right` among the elements flagged by `among`, 1 when there are none."""
    return float(right[among].mean()) if among.any() else 1.0


def _dot(first: Array, second: Array) -> float:
    return float(np.einsum("i,i->", first.ravel(), second.ravel(), dtype=np.float64))
