"""The plots of a report: scale measured against expected, the law's fit, and curves along a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from harness.checks.verdict import LawRecord
from harness.report.models import ProbePoint, ProbeRecord
from harness.report.summary import digest, pretty_formula
from harness.report.svg import FAINT, INK, OTHER, RIGHT, RULE, WRONG, inline, new_figure, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 120
_OFF = 0.01  # a scale 1 % off is a failure


@dataclass(frozen=True)
class Curve:
    """One line of a sweep plot; a value of None leaves a gap."""

    label: str
    values: Sequence[float | None]


def law_figure(record: ProbeRecord) -> Markup:
    """Draw measured against expected scale per module, and against the fitted law where it is a power law."""
    points = _thinned([p for p in record.points if _drawable(p)])
    predictions = [predicted(record.law, point) for point in points]
    fitted = all(value is not None and value != 0 for value in predictions) and bool(points)
    figure = new_figure(4.6 if fitted else 2.3, 2.1)
    left = figure.add_axes((0.11, 0.19, 0.36, 0.74) if fitted else (0.2, 0.19, 0.74, 0.74))
    _diagonal(left, [(p.expected, p.measured) for p in points], _colours(points))
    left.set_xlabel("expected scale", fontsize=7.5, color=FAINT, labelpad=1)
    left.set_ylabel("measured scale", fontsize=7.5, color=FAINT, labelpad=1)
    if fitted:
        right = figure.add_axes((0.61, 0.19, 0.36, 0.74))
        _diagonal(right, [(v or 0.0, p.measured) for v, p in zip(predictions, points, strict=True)], [OTHER])
        right.set_xlabel("scale by the fitted law", fontsize=7.5, color=FAINT, labelpad=1)
    return inline(figure, "law" + digest(record.loader, record.format, record.bench, record.variant), alt_text(record))


def alt_text(record: ProbeRecord) -> str:
    """Return what the law's plot shows, in words."""
    off = sum(not _right(point) for point in record.points)
    law = f"The fitted law is {pretty_formula(record.law.formula)}." if record.law else "No law was fitted."
    return f"Measured against expected scale, log-log: {off} of {len(record.points)} probes off the diagonal. {law}"


def predicted(law: LawRecord | None, point: ProbePoint) -> float | None:
    """Return constant * strength^a * alpha^b * rank^d, or None where the law is no power law."""
    if law is None or law.constant is None:
        return None
    inputs = {"strength": point.strength, "alpha": point.alpha, "rank": float(point.rank)}
    value = law.constant
    for name, exponent in law.exponents.items():
        base = inputs[name]
        if exponent is None or (base is None and exponent):
            return None
        if exponent:
            value *= math.copysign(abs(base or 0.0) ** exponent, base or 0.0) if base else 0.0
    return value


def sweep_figure(name: str, curves: Sequence[Curve], columns: int, *, log: bool, title: str) -> Markup:
    """Draw curves over the columns of a strip: point i stands under column i of `columns`."""
    figure = new_figure(max(columns * 0.95, 2.0), 1.15)
    axes = figure.add_axes((0.0, 0.08, 1.0, 0.84))
    for order, (curve, colour) in enumerate(zip(curves, (INK, OTHER), strict=False)):
        found = [(i, v) for i, v in enumerate(curve.values) if v is not None and _shown(v, log=log)]
        axes.plot([i for i, _ in found], [v for _, v in found], color=colour, lw=1.1, marker="o", ms=2.5)
        for i, value in found:
            away, look = (0, -9 if order else 4), {"size": 6.5, "color": colour, "ha": "center"}
            axes.annotate(f"{value:.3g}", (i, value), away, textcoords="offset points", **look)  # type: ignore[arg-type]
    axes.set_xlim(-0.5, columns - 0.5)
    axes.margins(y=0.28)
    if log:
        axes.set_yscale("log")
    quiet(axes)
    axes.spines["left"].set_visible(False)
    axes.set_xticks(range(columns), [""] * columns)
    axes.set_yticks([])
    axes.tick_params(length=0)
    return inline(figure, name, title)


def _diagonal(axes: Axes, pairs: Sequence[tuple[float, float]], colours: Sequence[str]) -> None:
    values = [abs(v) for pair in pairs for v in pair] or [1.0]
    low, high = min(values) / 1.6, max(values) * 1.6
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([low, high], [low, high], color=RULE, lw=1, zorder=0)
    for colour in dict.fromkeys(colours):
        chosen = [pair for i, pair in enumerate(pairs) if colours[i % len(colours)] == colour]
        for sign, face in ((1, colour), (-1, "none")):
            some = [(abs(x), abs(y)) for x, y in chosen if math.copysign(1, x * y) == sign]
            x, y = [x for x, _ in some], [y for _, y in some]
            axes.plot(x, y, ls="", marker="s" if colour == WRONG else "o", ms=3, mec=colour, mfc=face, mew=0.7)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    quiet(axes)


def _shown(value: float, *, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _colours(points: Sequence[ProbePoint]) -> list[str]:
    return [RIGHT if _right(point) else WRONG for point in points] or [RIGHT]


def _right(point: ProbePoint) -> bool:
    return abs(point.measured - point.expected) <= _OFF * abs(point.expected)


def _drawable(point: ProbePoint) -> bool:
    values = (point.measured, point.expected)
    return all(math.isfinite(value) and value != 0 for value in values)


def _thinned(points: list[ProbePoint]) -> list[ProbePoint]:
    step = math.ceil(len(points) / _MOST_POINTS) or 1
    return points[::step]
