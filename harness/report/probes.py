"""From the probes of a check to the record that a report draws."""

from __future__ import annotations

from collections.abc import Sequence

from harness.law.probe import Probe
from harness.report.models import ProbePoint, ProbeRecord
from harness.verdict.verdict import LawRecord


def probe_record(
    loader: str,
    format: str,
    bench: str,
    law: LawRecord | None,
    probes: Sequence[Probe],
    *,
    variant: str = "lora",
    most: int = 240,
) -> ProbeRecord:
    """Return a cell's probes as a record, at most `most` of them, those that are wrong before the others."""
    wrong = [probe for probe in probes if not probe.right]
    right = [probe for probe in probes if probe.right]
    kept = [*_thinned(wrong, most), *_thinned(right, max(most - len(wrong), most // 4))][:most]
    points = tuple(_point(probe) for probe in kept)
    return ProbeRecord(loader=loader, format=format, bench=bench, variant=variant, law=law, points=points)


def _thinned(probes: Sequence[Probe], most: int) -> Sequence[Probe]:
    return probes[:: max(-(-len(probes) // most), 1)]


def _point(probe: Probe) -> ProbePoint:
    return ProbePoint(
        module=probe.module,
        strength=probe.strength,
        alpha=probe.alpha,
        rank=probe.rank,
        measured=probe.measured,
        expected=probe.expected,
    )
