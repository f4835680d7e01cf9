"""Side effects: nothing else changed, neither in the model nor on disk nor for what is done after the load."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from harness.checks.cell import Cell
from harness.checks.families.direction import misplaced
from harness.checks.family import Scenario, Sighting, first_wrong, follows, has, judges, try_out
from harness.checks.observation import Observation, changed_otherwise
from harness.checks.trial import UNLOAD, Step, load, rebuild, run_trial
from harness.example import Example
from harness.loaders.protocol import CORE_VARIANTS
from harness.measure.compare import norm

_OTHER_SEED = 51
_CYCLES = 3  # of loading and unloading: what each leaves behind adds up
_SECOND_LOADS = (
    Scenario("LH402", (load(), load()), (1, 2), "two loads", "additive"),
    Scenario("LH402", (load(), load(), load()), (1, 3), "three loads", "additive"),
    Scenario("LH402", (load(), load(file="copy")), (1, 2), "loading the same LoRA under a second name", "additive"),
    Scenario("LH402", (load(), rebuild(2), load()), (1,), "loading into another model before", "no bias"),
)
_REPLACED = Scenario("LH402", (load(), load(0)), (0,), "loading at strength 0 what the last load replaces", "additive")
_HALF = Scenario("LH402", (load(0.5),), (0.5,), "loading at half the strength")
_REPLACES = 0.5
_AGAIN = Scenario(
    "LH402", (load(), load(_REPLACES)), (_REPLACES, 1 + _REPLACES), "loading again at half the strength", "additive"
)
_ELSEWHERE = Scenario(
    "LH402", (load(0.5), rebuild(2), load()), (1,), "loading at half the strength into another model before", "no bias"
)
_UNLOADS = (
    Scenario("LH403", (load(), UNLOAD, load(0.5)), (0.5,), "loading, unloading and loading at half the strength"),
    Scenario("LH403", (load(), UNLOAD, load(0), UNLOAD, load()), (1,), "loading, unloading, strength 0 and back"),
)


@judges("side_effects", finds="other layers, biases, the file, torch's own state", codes=("LH401", "LH404"))
def check_side_effects(observation: Observation) -> list[Sighting]:
    """LH401 when a layer outside the file changed, LH404 when the file did."""
    found = []
    elsewhere = misplaced(observation)
    others = tuple(name for name in observation.others_changed if name not in elsewhere)
    if others:
        fact = f"{len(others)} changed outside the file, first {others[0]}"
        if others[0] in observation.tied:
            fact += f", which shares its weight with {observation.tied[others[0]]}"
        found.append(Sighting("LH401", observation, others, fact))
    if observation.file_changed:
        found.append(Sighting("LH404", observation, fact="the bytes on disk differ after loading"))
    return found


@follows("side_effects", finds="a second load, a second LoRA", codes=("LH402", "LH405"))
def check_second_load(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """LH402: a second load gives neither the effect of one nor twice that. LH405: two LoRAs neither add up nor swap."""
    wrong = tuple(first_wrong(cell, once, _SECOND_LOADS, may_raise=True))
    if not wrong and has(cell, "additive") and has(cell, "any strength"):
        wrong = tuple(_with_another(cell, once))
    if not wrong:
        half = tuple(first_wrong(cell, once, [_HALF]))  # where half the strength is half the effect
        wrong = tuple(_kept(cell, once, half[0]) if half else _at_other_strengths(cell, once))
    yield from wrong


@follows("side_effects", finds="unload", codes=("LH403",), requires="unload")
def check_unload(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """LH403 when the declared unload does not restore the base weights, in any of `dtypes`, or disturbs later loads."""
    left = (_not_restored(cell, replace(once.example, dtype=dtype)) for dtype in dtypes)
    wrong = next(filter(None, left), None)
    wrong = wrong or (_half_gone(cell, once) if has(cell, "additive") else None)
    yield from [wrong] if wrong else first_wrong(cell, once, _UNLOADS)


def another(example: Example) -> Example:
    """Return another LoRA over every second module of `example`."""
    targets = tuple(replace(t, rank=max(1, t.rank - 1)) for t in example.targets[::2])
    return replace(example, targets=targets, value_seed=example.value_seed + _OTHER_SEED)


def _half_gone(cell: Cell, once: Observation) -> Sighting | None:
    """Return that unloading after a second LoRA leaves neither the first alone nor the base, where both were there."""
    second, both = another(once.example), (load(), load(file="other"))
    seen = run_trial(cell, once.example, (*both, UNLOAD), other=second)
    left = () if seen.raised else tuple(changed_otherwise(once, seen))
    if not left or all(fits[0].restored(len(both)) for fits in seen.fits.values()):
        return None
    beside = {t.name for t in once.example.targets} - {t.name for t in second.targets}
    held = run_trial(cell, once.example, both, other=second)
    if held.raised or not beside or any(held.fits[name][0].unchanged for name in beside):
        return None  # the second replaced the first
    fact = f"{len(left)} of {len(seen.fits)} layers have neither the first LoRA alone nor none after unloading a second"
    return Sighting("LH403", seen, left, fact)


def _not_restored(cell: Cell, example: Example) -> Sighting | None:
    seen = run_trial(cell, example, (load(), UNLOAD) * _CYCLES)
    if seen.raised:
        by_itself = run_trial(cell, example).raised  # what the load alone does is not the unload's
        return None if by_itself else Sighting("LH403", seen, fact=f"unload: {seen.raised.what}")
    left = tuple(name for name, fits in seen.fits.items() if not fits[0].restored(_CYCLES))
    fact = f"{len(left)} of {len(seen.fits)} layers differ from the base after unloading"
    return Sighting("LH403", seen, left, fact) if left else None


def _with_another(cell: Cell, once: Observation) -> Iterator[Sighting]:
    """Load a second LoRA, over every second module, after or before the first: both must be there, or the last alone.

    It has half the strength, so that one strength for both shows.
    """
    example = once.example
    second = replace(another(example), strength=example.strength / 2)
    alone = run_trial(cell, second)
    for steps, last in _ORDERS:
        both = run_trial(cell, example, steps, other=second)
        if alone.raised or both.raised:
            return
        shares = {name: _shares(name, once, alone, both) for name in both.fits}
        if any(all(s.off(wanted) <= s.slack for s in shares.values()) for wanted in ((1.0, 1.0), last)):
            continue
        name, other = (max(shares, key=lambda n: shares[n].off(wanted)) for wanted in ((1.0, 1.0), last))
        where = f", {shares[other]} in {other}" if shares[name].off(last) <= shares[name].slack else ""
        fact = f"{shares[name]} is there after loading both{where}, but should be all of both, or the last one only"
        yield Sighting("LH405", both, (name,), fact)
        return


def _kept(cell: Cell, once: Observation, half: Sighting) -> Iterator[Sighting]:
    """Yield LH408 where half the strength is wrong of a file that was loaded before, and right of a fresh one."""
    example = once.example
    fresh = replace(example, strength=0.5 * example.strength, value_seed=example.value_seed + _OTHER_SEED)
    seen = run_trial(cell, fresh)
    if not seen.raised and all(fits[0].direction_right and fits[0].scale_right for fits in seen.fits.values()):
        yield replace(half, code="LH408", fact=f"{half.fact}: at the strength of an earlier load of this file")


def _at_other_strengths(cell: Cell, once: Observation) -> Iterator[Sighting]:
    again = try_out(cell, once, _AGAIN, may_raise=True)
    if again == _REPLACES and cell.variant_name in CORE_VARIANTS:
        again = try_out(cell, once, _REPLACED, may_raise=True)
    wrong = again if isinstance(again, Sighting) else next(first_wrong(cell, once, [_ELSEWHERE], may_raise=True), None)
    yield from [wrong] if wrong else ()


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
    slack = 0.02 + 8 * once.fits[name][0].tolerance.scale + once.fits[name][0].relative_residual
    effects = [seen.changes[name].flatten() for seen in (once, alone) if name in seen.changes]
    effects = effects[:1] + [e for e in effects[1:] if name in alone.fits or norm(e) > 0.1 * norm(effects[0])]
    if not all(float(effect @ effect) for effect in effects):
        return _Shares(1.0, None, math.inf)  # a layer that does not change has no share to lose
    change = both.changes[name].flatten()[:, None]
    first, *second = torch.linalg.lstsq(torch.stack(effects, 1), change).solution.flatten().tolist()
    return _Shares(first, second[0] if second else None, slack)
