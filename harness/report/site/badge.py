"""A badge for a README: which scaling law a loader has, as a small SVG that says the same in words."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from harness.report.site.loaders import Loader
from harness.text import count, on_one_line

_LEFT = "LoRA scale"
_COLOURS = {"right": "#2b6e3c", "known": "#7d6608", "wrong": "#b0241c", "read": "#6b6a64", "unknown": "#6b6a64"}
_CHARACTER, _PADDING = 6.6, 12
_WRONG = ("failed", "errored", "refused")


def badge_state(loader: Loader) -> str:
    """Return `right`, `known` (right but for known faults), `wrong`, `read` (in its code alone) or `unknown`."""
    if loader.right is None:
        return "unknown"
    if not loader.right or any(seen.outcome in _WRONG for seen in loader.seen):
        return "wrong"
    if not loader.measured:
        return "read"
    return "known" if loader.faults else "right"


def badge_text(loader: Loader) -> str:
    """Return what the badge says: the law and a sign."""
    law = loader.formula.removeprefix("strength · ") if loader.right else loader.formula
    told = {
        "right": f"{law} ✓",
        "known": f"{law} ✓, {count(len(loader.faults), 'known fault')}",
        "wrong": f"{law} ✕",
        "read": f"{law}, not measured",
        "unknown": "not one law",
    }
    return on_one_line(told[badge_state(loader)], 60)


def badge(loader: Loader) -> str:
    """Return the badge as SVG."""
    right, label = badge_text(loader), on_one_line(loader.label, 60)
    left_width, right_width = (round(len(text) * _CHARACTER + _PADDING) for text in (_LEFT, right))
    width = left_width + right_width
    style = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    title = f"{label}: {_LEFT} {right}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label={quoteattr(title)}>'
        f"<title>{escape(title)}</title>"
        f'<rect width="{left_width}" height="20" fill="#3b3b38"/>'
        f'<rect x="{left_width}" width="{right_width}" height="20" fill="{_COLOURS[badge_state(loader)]}"/>'
        f'<g {style}><text x="{left_width / 2:g}" y="14">{escape(_LEFT)}</text>'
        f'<text x="{left_width + right_width / 2:g}" y="14">{escape(right)}</text></g></svg>'
    )
