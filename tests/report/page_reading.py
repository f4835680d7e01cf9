"""A page as its elements and the texts of those that have an id."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from harness.report.html import write_report
from harness.report.records import Run

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """The page as elements, with the text of every element that has an id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: dict[str, list[str]] = {}
        self.ids: list[tuple[int, str]] = []
        self.feed(text)
        self.texts = {identifier: "".join(pieces) for identifier, pieces in self.pieces.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if identifier := dict(attrs).get("id"):
            assert identifier not in self.pieces, f"id {identifier} twice"
            self.pieces[identifier] = []
            self.ids.append((len(self.open), identifier))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        self.ids = [entry for entry in self.ids if entry[0] <= len(self.open)]

    def handle_data(self, data: str) -> None:
        for _, identifier in self.ids:
            self.pieces[identifier].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def page_of(run: Run, out: Path, **options: object) -> Page:
    page = Page(write_report([run], out, **options).read_text(encoding="utf-8"))  # type: ignore[arg-type]
    assert page.open == []
    return page
