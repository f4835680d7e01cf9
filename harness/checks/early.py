"""The first sure answer: a law that is wrong everywhere is told while the search for other faults goes on.

Sure is what the full check would say too: one law, unambiguous, named from the planned probes, then held against random
files that had no part in naming it; nothing else was found; and nothing about it is a known failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.checks.cell import Cell
from harness.checks.describe import NamedFinding
from harness.checks.known import KNOWN_EXAMPLES, KnownFailure
from harness.checks.plan import Plan
from harness.checks.search import Search
from harness.checks.symptoms import Symptoms, unloaded
from harness.law.diagnosis import Diagnosis, diagnose
from harness.verdict.verdict import Verdict

Tell = Callable[[Verdict], object]

_HELD_OUT = 40  # random files that the law must foretell: what is met in one of thirteen shows with 95 %
_AT_LEAST = 5  # of a loader that gets few, half of them

_NONE = Diagnosis(None, None)


class Early:
    """Watches one cell's search; tells the verdict on the law once, if it becomes sure."""

    def __init__(self, cell: Cell, plan: Plan, known: Sequence[KnownFailure], tell: Tell | None) -> None:
        self._cell, self._plan, self._known, self._tell = cell, plan, known, tell
        self._first = Search()
        self._readings: set[str] = set()
        self._due = min(_HELD_OUT, max(_AT_LEAST, plan.examples_in(cell) // 2))

    def begin(self, planned: Search) -> None:
        """Name the law, or the few that it may be, from the planned probes."""
        law = self._alone(planned).law if self._tell else None
        if law is not None:
            self._first.join(planned)
            self._readings = {each.formula for each in (law, *law.others)}

    def look(self, later: Search) -> None:
        """Hold the law against the random files so far, and tell it when they are enough."""
        if not self._readings or later.examples < self._due:
            return
        readings, self._readings = self._readings, set()  # once
        self._first.join(later)
        diagnosis = self._alone(self._first)
        if diagnosis.law is not None and diagnosis.law.formula in readings and not diagnosis.law.others:
            self._say(diagnosis)

    def _alone(self, seen: Search) -> Diagnosis:
        """Return the diagnosis where a wrong law explains all that was seen and nothing else was found, else none."""
        if "LH209" not in seen.findings or unloaded(seen.probes):
            return _NONE
        diagnosis = diagnose(seen.probes)
        law, symptoms = diagnosis.law, Symptoms(seen, diagnosis)
        alone = all((code == "LH209") != symptoms.include(code) for code in seen.findings)
        wrong = law is not None and not law.is_trained and not law.factors
        return diagnosis if wrong and alone and diagnosis.trait is None else _NONE

    def _say(self, diagnosis: Diagnosis) -> None:
        seen = self._first
        verdict = NamedFinding(self._cell, seen.findings["LH209"], diagnosis).verdict(seen.examples)
        short = not self._plan.whole(self._cell) or self._plan.examples_in(self._cell) < KNOWN_EXAMPLES
        if self._tell and not any(k.names(verdict, short=short) for k in self._known):
            self._tell(verdict)
