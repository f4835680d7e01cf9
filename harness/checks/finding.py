"""A finding: one fault seen in one observation, before it becomes a verdict."""

from __future__ import annotations

from dataclasses import dataclass

from harness.checks.trial import Observation
from harness.verdict.codes import CODES


@dataclass(frozen=True)
class Finding:
    """`modules` are the failing ones, worst first; `fact` is the measured fact of the first line of the failure.

    `faint`: the change is so small beside rounding that its direction, too, may be at fault.
    """

    code: str
    observation: Observation
    modules: tuple[str, ...] = ()
    fact: str = ""
    faint: bool = False

    @property
    def family(self) -> str:
        """The check family this fault belongs to."""
        return CODES[self.code].family
