"""Smoke: the loader can be called at all and gives back a model that runs."""

from __future__ import annotations

from harness.checks.finding import Finding
from harness.checks.trial import Observation


def check_smoke(observation: Observation) -> list[Finding]:
    """LH901 when the loader raised, LH902 when it gave back something other than the model."""
    raised = observation.raised
    return [Finding(raised.code, observation, fact=raised.what)] if raised else []
