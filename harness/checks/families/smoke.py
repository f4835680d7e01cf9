"""Smoke: the loader can be called at all and gives back a model that runs."""

from __future__ import annotations

from harness.checks.family import Sighting, judges
from harness.checks.observation import Observation


@judges(
    "smoke",
    finds="the loader raises, hangs, kills its process, refuses, returns something else",
    codes=("LH901", "LH902", "LH903"),
)
def check_smoke(observation: Observation) -> list[Sighting]:
    """LH901 when the loader raised, LH902 when it gave back something else than the model, LH903 when it refused."""
    raised = observation.raised
    return [Sighting(raised.code, observation, fact=raised.what)] if raised else []
