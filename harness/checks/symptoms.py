"""Which findings of a cell only follow from what another one says, and need no verdict of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from harness.checks.family import Sighting
from harness.checks.observation import ROUNDING_LIKE
from harness.checks.search import Search
from harness.law.diagnosis import Diagnosis
from harness.law.probe import Probe
from harness.text import count
from harness.verdict.codes import CODES

_NOT_LOADED = ("LH101", "LH102")
_DIRECTIONS = frozenset({"LH104", "LH301", "LH302", "LH303", "LH304", "LH306"})
_RESIDUAL = ("LH301", "LH304", "LH306", "LH501")  # names of an unexplained change, which one fault may show in turn


@dataclass(frozen=True)
class Symptoms:
    """What else was found beside a finding, and the law behind the scales."""

    result: Search
    diagnosis: Diagnosis

    def include(self, code: str) -> bool:
        """Tell whether findings of `code` only follow from what another finding says."""
        if self.explained(code):
            return True
        if code == "LH209" and self._by_chance:
            return True
        if code in _RESIDUAL:
            return self._rarer(code, 3) or (code == "LH501" and self._nearly_another_direction)
        if code in _NOT_LOADED:
            return self._of_coverage(code)
        return code == "LH209" and self._of_scale()

    def explained(self, code: str) -> bool:
        """Whether another finding says what makes this one; a law that every scale follows is a fault of its own."""
        lawful = code == "LH209" and self._by_law and self.diagnosis.trait is None
        return not lawful and any(code in CODES[other].explains for other in self.result.findings if other in CODES)

    def of_some_modules(self, finding: Sighting) -> Sighting:
        """Return what files of one module each show as what it is: that some modules are not loaded, others are."""
        every = {p.module for p in self.result.probes}
        if finding.code != "LH101" or not 0 < len(self._unloaded) < len(every):
            return finding
        fact = f"{len(self._unloaded)} of {count(len(every), 'module')}, each in a file of its own, changed no output"
        return replace(finding, code="LH102", fact=fact)

    def _of_coverage(self, code: str) -> bool:
        scaled = "LH209" in self.result.findings and not self._unmoved
        if self._by_law or (scaled and not self._unloaded and not self._silent):
            return True  # the scale is wrong, and sometimes so small that nothing seems to be loaded
        if self._chance(code):
            return True
        modules = {p.module for p in self.result.probes}
        return code == "LH101" and "LH102" in self.result.findings and len(self._unloaded) < len(modules)

    def _of_scale(self) -> bool:
        found = self.result.findings
        if found["LH209"].faint and not _DIRECTIONS.isdisjoint(found):
            return True  # where the change is large enough to tell, its direction is wrong
        if self._unmoved and not self._by_law and any(code in found for code in _NOT_LOADED):
            return True
        if self._lost_digits or (self.diagnosis.code is None and "LH501" in found):
            return True
        named = self.diagnosis.law or self.diagnosis.trait
        if not named and self._chance("LH209"):
            return True
        return self._silent and not self._by_law and any(code in found for code in _NOT_LOADED)

    def _chance(self, code: str) -> bool:
        """Whether a change that is wrong throughout has, now and then, some scale or none."""
        return not self._unloaded and self._rarer(code, 10)

    def _rarer(self, code: str, times: int) -> bool:
        """Whether an unexplained change of some size is seen at least `times` as often as `code`."""
        counts = self.result.counts
        names = (other for other in _RESIDUAL if other != "LH501" or not self._nearly_another_direction)
        most = max(counts.get(other, 0) for other in names)
        return most > 0 and times * counts.get(code, 0) <= most

    @cached_property
    def _wrong(self) -> list[Probe]:
        return [p for p in self.result.probes if not p.right]

    @cached_property
    def _unloaded(self) -> set[str]:
        return unloaded(self.result.probes)

    @property
    def _silent(self) -> bool:
        """Whether nothing that is wrong has a scale, for which no small number that counts as 0 is the reason."""
        return not self._small and all(abs(p.measured) <= 4 * p.tolerance for p in self._wrong)

    @property
    def _unmoved(self) -> bool:
        """Whether nothing changes wherever a scale is wrong, and no small number that counts as 0 is the reason."""
        scale = self.result.findings.get("LH209")
        return bool(scale and scale.unmoved) and not self._small

    @property
    def _small(self) -> bool:
        """Whether a small number counts as 0."""
        return bool(self.diagnosis.trait and self.diagnosis.trait.about == "small")

    @property
    def _by_law(self) -> bool:
        law = self.diagnosis.law
        return bool(law and not law.is_trained and not self._unloaded)

    @property
    def _by_chance(self) -> bool:
        """Whether what was measured is another in every call, as dropout makes it."""
        left_on = self.result.findings.get("LH406")
        seen = left_on.observation if left_on else None
        return seen is not None and (bool(seen.unsteady) or any(n.endswith(" (dropout)") for n in seen.training))

    @property
    def _nearly_another_direction(self) -> bool:
        """Whether more is lost than digits, and a wrong direction is seen elsewhere: two names of one change."""
        return self._lost_share > ROUNDING_LIKE / 2 and not _DIRECTIONS.isdisjoint(self.result.findings)

    @cached_property
    def _lost_share(self) -> float:
        """The share of the change that LH501 saw lost, at most; 0 without it."""
        lost = self.result.findings.get("LH501")
        fits = [lost.observation.fits[name][0] for name in lost.modules] if lost else []
        return max((fit.relative_residual for fit in fits), default=0.0)

    @property
    def _lost_digits(self) -> bool:
        """Whether every scale that is off is off by less than the digits that LH501 saw lost."""
        wrong, share = self._wrong, self._lost_share
        return bool(wrong) and all(abs(p.measured - p.expected) <= share * abs(p.expected) for p in wrong)


def unloaded(probes: Sequence[Probe]) -> set[str]:
    """Return the modules that never changed although their scale should have been visible."""
    visible = [p for p in probes if abs(p.expected) > 4 * p.tolerance]
    changed = {p.module for p in visible if abs(p.measured) > 4 * p.tolerance}
    return {p.module for p in visible} - changed
