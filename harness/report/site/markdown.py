"""The pages of docs/findings as HTML, where the documentation lies beside the package; raw HTML in them stays text."""

from __future__ import annotations

from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from harness.law.findings import LINK, findings

_ROOT = Path(__file__).parents[3]
_WEB = ("https://", "http://")


def finding_html(page: str) -> Markup | None:
    """Return what the page of a finding says under its heading; None where it does not lie beside the package."""
    path = _ROOT / LINK.format(page)
    if not path.is_file():
        return None
    reader = MarkdownIt("commonmark", {"html": False})
    tokens = reader.parse(path.read_text(encoding="utf-8"))
    body = tokens[3:] if tokens and tokens[0].type == "heading_open" else tokens
    for token in body:
        token.children = _linked(token.children) if token.children else token.children
    return Markup(reader.renderer.render(body, reader.options, {}))


def _linked(tokens: list[Token]) -> list[Token]:
    """Keep links to the web and to other findings; what they say stays where they lead nowhere."""
    kept: list[Token] = []
    dropped = 0
    for token in tokens:
        if token.type == "link_open":
            target = str(token.attrs.get("href", ""))
            own = target.removesuffix(".md")
            if own in findings():
                token.attrs["href"] = f"{own}.html"
            elif not target.startswith(_WEB):
                dropped += 1
                continue
        if token.type == "link_close" and dropped:
            dropped -= 1
            continue
        kept.append(token)
    return kept
