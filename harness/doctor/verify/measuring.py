"""How one layer is measured: from samples until the scale is clear, or from all its rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from harness.doctor.verify.layer import TWO_ROUNDINGS, MergedLayer, Sample
from harness.doctor.verify.measurement import (
    EXPLAINED,
    MergeMeasurement,
    State,
    has_strays,
    judge,
    off,
    untouched,
    voted,
)
from harness.doctor.verify.rows import Damage, Rounding, damaged_rows, runs_of
from harness.doctor.verify.vote import Flags, Vote

# Elements sampled, and the relative width of the interval at which that is enough
_SAMPLES = ((16_000, 0.01), (100_000, 0.04), (400_000, math.inf))


def measure(layer: MergedLayer, expected: float, without: Flags | None = None) -> MergeMeasurement:
    """Measure one layer from a sample of its rows, larger where the answer is vague.

    `expected` is the scale it should have: with it an unchanged layer shows whether nothing was merged, and a layer
    that was merged and rounded twice can be told from one that was changed by something else. Rows that are not finite
    are told, and left out of the numbers; so are rows `without`.
    """
    window = None
    for elements, enough in _SAMPLES:
        whole = layer.sample(elements)
        kept = whole.finite & np.isfinite(whole.product).all(axis=1)
        clean = kept if without is None else kept & ~without[whole.index]
        sample = whole if clean.all() else whole.of(clean)
        seen = len(whole.index) / max(layer.rows, 1)
        if not clean.any():
            state: State = "unexplained" if kept.any() else "not finite"
            return replace(untouched(whole, Vote(0.0, 0.0, 0.0, 0.0), expected), state=state, seen=seen)
        found = voted(sample, window)
        undecided = sample.changed.any() or found.low <= expected <= found.high
        if (
            not undecided
            or found.width <= enough * abs(found.scale)
            or whole.product.size >= layer.rows * layer.columns
        ):
            break
        window = (found.low - found.width, found.high + found.width)
    made = replace(judge(sample, found, expected, layer.least_drift), seen=seen)
    if kept.all():
        return made
    broken = tuple(Damage(int(row), int(row) + 1, "non-finite") for row in whole.index[~kept])
    return replace(made, state="not finite", damaged=broken)


def measure_fully(layer: MergedLayer, expected: float, device: str = "cpu") -> MergeMeasurement:
    """Measure one layer from all its rows: the scale from the sample, the residual of every row against its rounding.

    `device` makes the products of the rows.
    """
    first = measure(layer, expected)
    sample = layer.sample(_SAMPLES[0][0])
    sample = sample.of(sample.finite & np.isfinite(sample.product).all(axis=1))
    scale = expected if first.state == "hidden" else first.scale
    rounding = Rounding.of(sample, scale, TWO_ROUNDINGS if first.state == "two roundings" else 1.0)
    sums = layer.stream(rounding, device)
    whole = replace(first, elements=layer.rows * layer.columns, seen=1.0)
    if first.state == "not merged" and sums.changed.any():
        whole = replace(whole, state="mixed")
    broken = ~np.isfinite(sums.energy)
    if whole.state not in ("merged", "partly", "damaged", "two roundings", "hidden", "mixed", "not finite"):
        return _with_damage(whole, layer, [Damage(*run, "non-finite") for run in runs_of(broken)])
    found = damaged_rows(layer, sample, sums, rounding, _usual(sample, first, rounding))
    kept = np.ones(layer.rows, bool)
    for damage in found:
        kept[slice(*damage.rows)] = False
    if kept.mean() < 0.5 and not broken.any():
        return replace(whole, state="mixed") if has_strays(layer.sample(_SAMPLES[-1][0]), scale) else whole
    if found:
        rest = measure(layer, expected, ~kept)
        whole = replace(rest, elements=whole.elements, seen=1.0)
    overlap, product = float(sums.overlap[kept].sum()), float(sums.product[kept].sum())
    return _with_damage(replace(whole, overlap=overlap, product=product), layer, found)


def _usual(sample: Sample, first: MergeMeasurement, rounding: Rounding) -> float:
    """Return the share of elements beyond what rounding allows that a row has which is right."""
    if first.explained >= EXPLAINED:
        return 1 - first.explained
    if first.state != "two roundings":
        return 0.0
    error, _ = off(sample, rounding.scale)
    return float(np.median((error > rounding.allowance(sample.product, sample.half)).mean(axis=1)))


def _with_damage(made: MergeMeasurement, layer: MergedLayer, found: list[Damage]) -> MergeMeasurement:
    """Return `made` with the rows that are not right, and the state that they leave."""
    still = np.zeros(layer.rows, bool)
    for start, stop in (*made.unmerged, *(damage.rows for damage in found if damage.kind == "unmerged")):
        still[start:stop] = True
    others = tuple(damage for damage in found if damage.kind != "unmerged")
    made = replace(made, unmerged=tuple(runs_of(still)), damaged=others)
    if any(damage.kind == "non-finite" for damage in others):
        return replace(made, state="not finite")
    if made.state not in ("merged", "partly", "two roundings", "hidden"):
        return made
    if others:
        return replace(made, state="damaged")
    return replace(made, state="partly") if still.any() else made
