"""Side effects: nothing else changed, neither in the model nor on disk, and loading leaves no state behind."""

from __future__ import annotations

from harness.checks.direction import misplaced
from harness.checks.finding import Finding
from harness.checks.trial import Observation
from harness.measure.compare import Fit


def check_side_effects(observation: Observation) -> list[Finding]:
    """LH401 when a layer outside the file changed, LH404 when the file did."""
    found = []
    elsewhere = misplaced(observation)
    others = tuple(name for name in observation.others_changed if name not in elsewhere)
    if others:
        fact = f"{len(others)} layers or parameters outside the file changed, first {others[0]}"
        found.append(Finding("LH401", observation, others, fact))
    if observation.file_changed:
        found.append(Finding("LH404", observation, fact="the bytes on disk differ after loading"))
    return found


def check_second_load(once: Observation, twice: Observation) -> list[Finding]:
    """LH402 when loading the same file twice gives neither the effect of one load nor double that in every module."""
    if any(not fits[0].finite for fits in (*once.fits.values(), *twice.fits.values())):
        return []  # LH502 says so already
    if once.raised or twice.raised:  # refusing a second load is a documented choice of several loaders
        return []
    for times in (1, 2):
        if all(_near(fits[0], times * once.fits[name][0].scale) for name, fits in twice.fits.items()):
            return []
    worst = max(twice.fits, key=lambda name: abs(twice.fits[name][0].scale))
    first, second = once.fits[worst][0].scale, twice.fits[worst][0].scale
    fact = f"scale {second:.4g} after two loads, but should be {first:.4g} or {2 * first:.4g}"
    return [Finding("LH402", twice, (worst,), fact)]


def check_unload(observation: Observation) -> list[Finding]:
    """LH403 when the declared `unload` leaves a layer other than it was before loading."""
    if observation.raised:
        return [Finding("LH403", observation, fact=f"unload: {observation.raised.what}")]
    left = tuple(name for name, fits in observation.fits.items() if not fits[0].unchanged)
    fact = f"{len(left)} of {len(observation.fits)} layers differ from the base after unloading"
    return [Finding("LH403", observation, left, fact)] if left else []


def _near(fit: Fit, wanted: float) -> bool:
    return abs(fit.scale - wanted) <= 4 * fit.tolerance.scale
