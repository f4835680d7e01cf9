"""Coverage: every module of the file reaches its layer."""

from __future__ import annotations

from harness.checks.family import Sighting, judges
from harness.checks.observation import Observation
from harness.text import count


@judges("coverage", finds="no effect, modules left out", codes=("LH101", "LH102"))
def check_coverage(observation: Observation) -> list[Sighting]:
    """LH101 when no module of the file changed the model, LH102 when some did not."""
    wanted = [name for name, fits in observation.fits.items() if _visible(observation, name)]
    missing = tuple(name for name in wanted if observation.fits[name][0].unchanged)
    if not missing:
        return []
    fact = f"{len(missing)} of {count(len(wanted), 'module')} of the file left their layer as it was"
    return [Sighting("LH101" if len(missing) == len(wanted) else "LH102", observation, missing, fact)]


def _visible(observation: Observation, name: str) -> bool:
    """Whether the trained delta of this module is larger than what rounding can hide."""
    whole = observation.fits[name][0]
    return abs(whole.expected) * whole.product > 2 * whole.tolerance.noise
