"""Search for violations: draw examples and judge each with every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from harness.checks.coverage import check_coverage
from harness.checks.direction import check_direction
from harness.checks.finding import Finding
from harness.checks.numerics import check_numerics
from harness.checks.scale import check_scale, probes_of
from harness.checks.side_effects import check_side_effects
from harness.checks.smoke import check_smoke
from harness.checks.trial import Cell, Observation, run_trial
from harness.example import Example
from harness.files import FORMATS
from harness.law.probe import Probe

_MAX_RAISED = 3  # a subject that keeps raising, or hanging, tells nothing new


@dataclass
class Search:
    """What a search found: the first observation per code, every probe, and how many examples ran."""

    findings: dict[str, Finding] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    examples: int = 0

    def add(self, observation: Observation, probes: Sequence[Probe], findings: Sequence[Finding]) -> None:
        """Keep what one example showed."""
        self.examples += 1
        self.probes.extend(probes)
        for finding in findings:
            self.keep(finding)
            self.counts[finding.code] = self.counts.get(finding.code, 0) + 1

    def keep(self, finding: Finding) -> None:
        """Let the first finding of a code stand for it, or the first that is not faint."""
        if finding.code not in self.findings or (self.findings[finding.code].faint and not finding.faint):
            self.findings[finding.code] = finding

    def join(self, later: Search) -> None:
        """Add what another search found after this one."""
        for code, finding in later.findings.items():
            self.keep(finding)
            self.counts[code] = self.counts.get(code, 0) + later.counts[code]
        self.probes += later.probes
        self.examples += later.examples


def judge(cell: Cell, observation: Observation) -> list[Finding]:
    """Apply every family to one observation."""
    if observation.raised:
        return check_smoke(observation)
    return [
        *check_coverage(observation),
        *check_scale(observation, zero_alpha_ambiguous=zero_alpha_is_ambiguous(cell.format)),
        *check_direction(observation),
        *check_side_effects(observation),
        *check_numerics(observation),
    ]


def observe(cell: Cell, example: Example) -> tuple[Observation, list[Probe], list[Finding]]:
    """Run one example and return what it showed, as an observation, as probes and as findings."""
    observation = run_trial(cell, example)
    probes = [] if observation.raised else probes_of(observation, cell.view, root=cell.variant.root)
    if zero_alpha_is_ambiguous(cell.format):
        probes = [p for p in probes if p.alpha != 0]
    return observation, probes, judge(cell, observation)


def search(
    cell: Cell, examples: SearchStrategy[Example], *, max_examples: int, base_seed: int, until: str | None = None
) -> Search:
    """Run `max_examples` examples, collecting every kind of finding; it stops early only when `until` is found."""
    result = Search()

    def collect(example: Example) -> None:
        if until in result.counts:
            raise _FoundError
        if result.counts.get("LH901", 0) < _MAX_RAISED:
            result.add(*observe(cell, example))

    run: Callable[[], None] = seed(base_seed)(
        quiet_settings(max_examples, (Phase.generate,))(given(example=examples)(collect))
    )
    with suppress(_FoundError):
        run()
    return result


class _FoundError(Exception):
    """What was looked for is found: Hypothesis draws no more."""


def zero_alpha_is_ambiguous(format_name: str) -> bool:
    """Whether readers of this format split over alpha = 0 (0, or the rank): true where alpha is a tensor of its own."""
    return FORMATS[format_name].alpha[0] == "tensor"


def quiet_settings(max_examples: int, phases: Sequence[Phase] = (Phase.generate, Phase.shrink)) -> Any:
    """Return Hypothesis settings without a database, a deadline, health checks or prints."""
    return settings(
        max_examples=max_examples,
        phases=phases,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
