"""Side effects: nothing else changed, neither in the model nor on disk."""

from __future__ import annotations

from harness.checks.direction import misplaced
from harness.checks.finding import Finding
from harness.checks.trial import Observation


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
