from __future__ import annotations

from report_samples import IGNORED

from harness.law.probe import Probe
from harness.report.models import probe_record


def probe(index: int, *, right: bool) -> Probe:
    return Probe(f"m.{index}", 1.0, 0, (8.0,), (4,), 2.0 if right else 1.0, 1e-6)


def test_a_probe_becomes_a_point_with_its_own_alpha_and_rank() -> None:
    two = Probe("b", 0.5, 1, (8.0, None), (4, 7), 0.25, 1e-6)
    (point,) = probe_record("x", "kohya", "bench", IGNORED, [two]).points
    assert (point.module, point.strength, point.alpha, point.rank) == ("b", 0.5, None, 7)
    assert (point.measured, point.expected) == (0.25, 0.5)


def test_wrong_probes_are_kept_before_right_ones() -> None:
    probes = [probe(n, right=n % 100 != 0) for n in range(2000)]
    record = probe_record("x", "kohya", "bench", None, probes, most=50)
    assert len(record.points) <= 50
    assert sum(point.measured != point.expected for point in record.points) == 20


def test_many_wrong_probes_are_thinned_evenly() -> None:
    record = probe_record("x", "kohya", "bench", None, [probe(n, right=False) for n in range(1000)], most=50)
    assert [point.module for point in record.points][:3] == ["m.0", "m.20", "m.40"]
    assert len(record.points) == 50
