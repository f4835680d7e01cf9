"""Matplotlib figures as small inline SVG that follows the page's theme and its content security policy."""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

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
    axes.tick_params(which="both", length=2, width=0.5, color=RULE, labelcolor=FAINT, labelsize=7.5, pad=2)
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
