"""Numerics: nothing but the rounding of the working dtype separates the loader from the formula."""

from __future__ import annotations

from harness.checks.families.direction import by_slices, small_fault
from harness.checks.family import Sighting, judges
from harness.checks.observation import Observation, wrong_direction


@judges("numerics", finds="precision lost beyond the dtype's rounding, NaN", codes=("LH501", "LH502"))
def check_numerics(observation: Observation) -> list[Sighting]:
    """LH502 for NaN or infinite weights, LH501 for a residual larger than rounding explains."""
    if observation.not_finite:
        fact = f"{len(observation.not_finite)} layers hold NaN or infinity"
        return [Sighting("LH502", observation, observation.not_finite, fact)]
    fits = {name: parts[0] for name, parts in observation.fits.items()}
    coarse = [
        n for n, f in fits.items() if not (f.unchanged or f.direction_right or f.along_base or wrong_direction(f))
    ]
    coarse = [n for n in coarse if not by_slices(observation.fits[n][1:]) and not small_fault(observation, n, fits[n])]
    if not coarse:
        return []
    coarse.sort(key=lambda name: -fits[name].residual / fits[name].tolerance.noise)
    worst = fits[coarse[0]]
    times = worst.residual / worst.tolerance.noise
    allowed = f"{times:.{int(times < 10)}f} times what {worst.tolerance.dtype} rounding allows"
    fact = f"residual {worst.relative_residual:.1e} of the change, {allowed}"
    return [Sighting("LH501", observation, tuple(coarse), fact)]
