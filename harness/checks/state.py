"""State: what is left of a load when something follows it. Another load, an unload, another strength, another file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.checks.direction import wrong_direction
from harness.checks.finding import Finding
from harness.checks.steps import UNLOAD, Step, load, rebuild, set_strength
from harness.checks.trial import Cell, Observation, run_trial
from harness.example import Example
from harness.measure.compare import Fit, norm

_OTHER_SEED = 50


@dataclass(frozen=True)
class _Story:
    """Steps, the multiples of one load's scale any of which is right after them, and the code when it is another."""

    code: str
    steps: tuple[Step, ...]
    right: tuple[float, ...]
    told: str


_LOADS = (
    _Story("LH402", (load(), load()), (1, 2), "two loads"),
    _Story("LH402", (load(), load(file="copy")), (1, 2), "loading the same LoRA under a second name"),
)
_MODELS = (_Story("LH402", (load(), rebuild(2), load()), (1,), "loading into another model before"),)
_UNLOADS = (
    _Story("LH403", (load(), UNLOAD, load(0.5)), (0.5,), "loading, unloading and loading at half the strength"),
    _Story("LH403", (load(), UNLOAD, load(0), UNLOAD, load()), (1,), "loading, unloading, strength 0 and back"),
)
_STRENGTHS = (
    _Story("LH207", (load(), set_strength(0.5)), (0.5,), "setting half the strength without loading again"),
    _Story(
        "LH207", (load(), set_strength(0), set_strength(1.5)), (1.5,), "setting strength 0, then 1.5 times the first"
    ),
)


def check_state(cell: Cell, example: Example, *, dtypes: Sequence[str] = ("float32",)) -> Iterator[Finding]:
    """Yield what one load of `example` leaves behind that it should not; `example` has strength 1.

    LH402: a second load gives neither the effect of one nor twice that. LH403: unloading does not restore. LH405: a
    second LoRA neither adds up with the first nor takes its place. LH207: a strength set later is not honoured.
    """
    once = run_trial(cell, example)
    if once.raised or not all(fits[0].finite for fits in once.fits.values()):
        return  # said already
    told: set[str] = set()
    for finding in _unloaded(cell, example, dtypes) if cell.subject.declaration.unload else ():
        told.add(finding.code)
        yield finding
    for story in _stories(cell):
        for finding in () if story.code in told else _after(cell, example, once, story):
            told.add(story.code)
            yield finding
    if cell.variant.additive and "LH402" not in told:
        yield from _with_another(cell, example, once)


def _stories(cell: Cell) -> list[_Story]:
    """Return what can be told of a loader in this cell."""
    declared = cell.subject.declaration
    stories = [*(_LOADS if cell.variant.additive else ()), *(() if cell.variant.bias else _MODELS)]
    stories += [*(_STRENGTHS if declared.set_strength else ()), *(_UNLOADS if declared.unload else ())]
    if cell.variant.strengths:  # what another strength means is left to the loader
        return [story for story in stories if all(step.times == 1 or step == rebuild(2) for step in story.steps)]
    return stories


def _after(cell: Cell, example: Example, once: Observation, story: _Story) -> Iterator[Finding]:
    seen = run_trial(cell, example, story.steps)
    if seen.raised and story.code == "LH402":
        return  # refusing a second load is a documented choice of several loaders
    if seen.raised:
        yield Finding(story.code, seen, fact=f"{story.told} raised: {seen.raised.what}")
        return
    clear = {n: f for n, f in seen.fits.items() if not wrong_direction(once.fits[n][0])}  # the others have no scale
    if not any(all(_near(f[0], times * once.fits[n][0].scale) for n, f in clear.items()) for times in story.right):
        yield Finding(story.code, seen, *_worst(once, clear, story))


def _worst(once: Observation, seen: Mapping[str, Sequence[Fit]], story: _Story) -> tuple[tuple[str, ...], str]:
    first = {name: fits[0].scale for name, fits in once.fits.items()}
    off = {n: min(abs(f[0].scale - t * first[n]) for t in story.right) for n, f in seen.items()}
    name = max(off, key=lambda each: off[each])
    wanted = " or ".join(f"{times * first[name]:.4g}" for times in story.right)
    return (name,), f"scale {seen[name][0].scale:.4g} after {story.told}, but should be {wanted}"


def _unloaded(cell: Cell, example: Example, dtypes: Sequence[str]) -> Iterator[Finding]:
    """Yield the first dtype in which the declared unload leaves a layer other than it was before loading."""
    for dtype in dtypes:
        seen = run_trial(cell, replace(example, dtype=dtype), (load(), UNLOAD))
        if seen.raised:
            yield Finding("LH403", seen, fact=f"unload: {seen.raised.what}")
            return
        left = tuple(name for name, fits in seen.fits.items() if not fits[0].unchanged)
        if left:
            fact = f"{len(left)} of {len(seen.fits)} layers differ from the base after unloading"
            yield Finding("LH403", seen, left, fact)
            return


def _with_another(cell: Cell, example: Example, once: Observation) -> Iterator[Finding]:
    """Load a second LoRA, over every second module, after or before the first: both must be there, or the last alone.

    It has half the strength, so that one strength for both shows.
    """
    targets = tuple(replace(t, rank=max(1, t.rank - 1)) for t in example.targets[::2])
    second = replace(
        example, targets=targets, strength=example.strength / 2, value_seed=example.value_seed + _OTHER_SEED
    )
    alone = run_trial(cell, second)
    for steps, last in _ORDERS:
        both = run_trial(cell, example, steps, other=second)
        if alone.raised or both.raised:
            return
        shares = {name: _shares(name, once, alone, both) for name in both.fits}
        if any(all(s.off(wanted) <= s.slack for s in shares.values()) for wanted in ((1.0, 1.0), last)):
            continue
        name = max(shares, key=lambda n: shares[n].off((1.0, 1.0)))
        fact = f"{shares[name]} is there after loading both, but should be all of both, or the last one only"
        yield Finding("LH405", both, (name,), fact)
        return


_Pair = tuple[float, float]
_ORDERS: tuple[tuple[tuple[Step, ...], _Pair], ...] = (
    ((load(), load(0.5, "other")), (0.0, 1.0)),
    ((load(0.5, "other"), load()), (1.0, 0.0)),
)


@dataclass(frozen=True)
class _Shares:
    """The parts of either LoRA's own effect on one layer; `second` is None where it has none."""

    first: float
    second: float | None
    slack: float

    def off(self, wanted: _Pair) -> float:
        """Return how far the shares are from `wanted`."""
        return abs(self.first - wanted[0]) + (0.0 if self.second is None else abs(self.second - wanted[1]))

    def __str__(self) -> str:
        """Return the shares in words."""
        first = f"{self.first:.3f} of the first LoRA"
        return first if self.second is None else f"{first} and {self.second:.3f} of the second"


def _shares(name: str, once: Observation, alone: Observation, both: Observation) -> _Shares:
    """Return the parts of either LoRA's own effect that are there with both, by least squares."""
    import torch

    slack = 0.02 + 8 * once.fits[name][0].tolerance.scale + once.fits[name][0].relative_residual
    effects = [seen.changes[name].flatten() for seen in (once, alone) if name in seen.changes]
    effects = effects[:1] + [e for e in effects[1:] if name in alone.fits or norm(e) > 0.1 * norm(effects[0])]
    if not all(float(effect @ effect) for effect in effects):
        return _Shares(1.0, None, math.inf)  # a layer that does not change has no share to lose
    change = both.changes[name].flatten()[:, None]
    first, *second = torch.linalg.lstsq(torch.stack(effects, 1), change).solution.flatten().tolist()
    return _Shares(first, second[0] if second else None, slack)


def _near(fit: Fit, wanted: float) -> bool:
    return abs(fit.scale - wanted) <= 4 * fit.tolerance.scale
