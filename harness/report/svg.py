"""Matplotlib figures as small inline SVG that follows the page's theme and its content security policy."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from harness.report.models import ProbePoint, ProbeRecord, thinned
from harness.report.summary import digest, pretty_formula
from harness.verdict.verdict import LawRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that figures are drawn in, each standing for a variable of the style sheet.
INK, FAINT, RULE, WRONG, RIGHT, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
    WRONG: "var(--failed)",
    RIGHT: "var(--passed)",
    OTHER: "var(--accent)",
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_DEFAULTS = ("font-family", "stroke-linejoin", "stroke-linecap")
_LENGTHS = ("d", "x", "y", "width", "height", "transform")
_SHARED = ("fill", "stroke", "stroke-width")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-harness",
    "font.size": 8.0,
    "axes.linewidth": 0.6,
    "path.simplify": True,
    "text.usetex": False,
}


def available() -> bool:
    """Return True when figures can be drawn; without matplotlib a report has the tables alone."""
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """Return an empty transparent figure of `width` x `height` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="none")


def quiet(axes: Axes) -> None:
    """Give an axis the report's look: no box, thin rules, small faint ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(which="both", length=2, width=0.5, color=RULE, labelcolor=FAINT, labelsize=_LABEL, pad=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(numticks=4))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def inline(figure: Figure, name: str, title: str) -> Markup:
    """Return the figure as an `<svg>` element whose ids start with `name` and whose alt text is `title`."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    for element in root.iter():
        _plain_attributes(element)
    _rename(root, name)
    _hoist(root)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": title, "class": "plot"}
    return Markup(_compact(ElementTree.tostring(root, encoding="unicode")))


def _strip(root: ElementTree.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style") or _empty(child):
                parent.remove(child)


def _empty(element: ElementTree.Element) -> bool:
    kind = element.tag.rpartition("}")[2]
    invisible = kind == "path" and "fill: none" in element.get("style", "") and "stroke" not in element.get("style", "")
    return invisible or (kind == "defs" and len(element) == 0)


def _plain_attributes(element: ElementTree.Element) -> None:
    """Turn a style attribute, which the policy forbids, into presentation attributes; the page chooses the font."""
    style = element.attrib.pop("style", "")
    for part in filter(None, (part.strip() for part in style.split(";"))):
        key, _, value = part.partition(":")
        if key.strip() == "font":
            element.set("font-size", re.sub(r"^.*?(\d+(\.\d+)?)px.*$", r"\1", value.strip()))
        elif key.strip() not in _DEFAULTS:
            element.set(key.strip(), value.strip())
    for key, value in list(element.attrib.items()):
        rounded = re.sub(r"(\d\.\d)\d+", r"\1", value) if key in _LENGTHS else value
        element.set(key, _VARIABLES.get(value, " ".join(rounded.split())))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]


def _hoist(element: ElementTree.Element) -> None:
    """Say what markers share once, on their group, and drop groups that hold nothing."""
    for child in list(element):
        _hoist(child)
        if len(child) == 0 and child.tag == f"{{{_SVG}}}g":
            element.remove(child)
    kinds = {child.tag.rpartition("}")[2] for child in element}
    for key in _SHARED if kinds == {"use"} else ():
        values = {child.attrib.get(key) for child in element}
        if len(values) == 1 and None not in values:
            element.set(key, values.pop() or "")
            for child in element:
                del child.attrib[key]


def _rename(root: ElementTree.Element, name: str) -> None:
    """Keep only the ids that something refers to, and make them unique in the page."""
    used: set[str] = set()
    for element in root.iter():
        if target := element.attrib.pop(_XLINK, None):
            element.set("href", f"#{name}-{target.removeprefix('#')}")
            used.add(target.removeprefix("#"))
        if clip := element.get("clip-path"):
            element.set("clip-path", clip.replace("#", f"#{name}-"))
            used.add(clip.removeprefix("url(#").removesuffix(")"))
    for element in root.iter():
        identifier = element.attrib.pop("id", None)
        if identifier in used:
            element.set("id", f"{name}-{identifier}")


def _compact(text: str) -> str:
    text = re.sub(r"<(/?)ns\d+:", r"<\1", text)
    text = re.sub(r" xmlns(:ns\d+)?=\"[^\"]*\"", "", text)
    return re.sub(r">\s+<", "><", text)


_MOST_POINTS = 60
_WIDTH = 3.4  # inches: 245 pt, shown at 328 px and more, so that a label of 9 pt is 12 px
_LABEL = 9
_OFF = 0.01  # a scale 1 % off is a failure


@dataclass(frozen=True)
class Curve:
    """One line of a sweep plot; a value of None leaves a gap."""

    label: str
    values: Sequence[float | None]


def law_figure(record: ProbeRecord) -> Markup:
    """Draw measured against expected scale per module, and where the fitted law puts it if it is a power law."""
    points = thinned([p for p in record.points if _drawable(p)], _MOST_POINTS)
    figure = new_figure(_WIDTH, _WIDTH * 0.8)
    axes = figure.add_axes((0.18, 0.19, 0.77, 0.78))
    _diagonal(axes, [(p.expected, p.measured) for p in points], [RIGHT if _right(p) else WRONG for p in points])
    fitted = {(abs(p.expected), abs(v)) for p in points if (v := predicted(record.law, p))}
    axes.plot([x for x, _ in fitted], [y for _, y in fitted], ls="", marker="x", ms=6, mec=OTHER, mew=0.7)
    axes.set_xlabel("expected scale", fontsize=_LABEL, color=FAINT, labelpad=1)
    axes.set_ylabel("measured scale", fontsize=_LABEL, color=FAINT, labelpad=1)
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
    figure = new_figure(max(columns * 1.1, 2.0), 1.3)
    axes = figure.add_axes((0.0, 0.08, 1.0, 0.84))
    for order, (curve, colour) in enumerate(zip(curves, (INK, OTHER), strict=False)):
        found = [(i, v) for i, v in enumerate(curve.values) if v is not None and _shown(v, log=log)]
        axes.plot([i for i, _ in found], [v for _, v in found], color=colour, lw=1.1, marker="o", ms=2.5)
        for i, value in found:
            away, look = (0, -11 if order else 5), {"size": _LABEL, "color": colour, "ha": "center"}
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


def _right(point: ProbePoint) -> bool:
    return abs(point.measured - point.expected) <= _OFF * abs(point.expected)


def _drawable(point: ProbePoint) -> bool:
    values = (point.measured, point.expected)
    return all(math.isfinite(value) and value != 0 for value in values)
