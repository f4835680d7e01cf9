"""Render and write the site: each page as HTML and as JSON beside it, badges, and the index that is searched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from harness.errors import UserError
from harness.files import FORMATS
from harness.law.explained import about_code, about_finding, examples_of, findings_with, symptoms
from harness.law.findings import Finding, findings
from harness.law.known import tools
from harness.law.reads import every_row as every_read
from harness.law.reads import measured_on, title_of
from harness.outputs import replace_file, saying
from harness.report.html import asset, environment, policy
from harness.report.records import Run
from harness.report.releases import committed, look
from harness.report.site import in_browser
from harness.report.site.badge import badge, badge_state, badge_text
from harness.report.site.loaders import ALPHAS, ASKED, Loader, releases_of, site_loaders, stem_of
from harness.report.site.markdown import finding_html
from harness.report.site.page import Page
from harness.text import plain
from harness.verdict.codes import CODES, Code

_MARK = "lora-harness site"


def write_site(runs: Sequence[Run], out: Path | str, *, python: in_browser.Parts | None = None) -> int:
    """Write the site of `runs` into the folder `out` and return the number of pages.

    With `python`, which is Python for WebAssembly, it has a page that diagnoses a file in the browser.

    Raises:
        UserError: no run, `out` holds something else than such a site, or it cannot be written.
    """
    out = Path(out)
    if not runs:
        raise UserError("no run for the site: name at least one run file (RUN.jsonl)")
    _refuse_other_folder(out)
    pages = [*site_pages(runs, diagnoses=python is not None)]
    write = _Writer(diagnoses=python is not None)
    with saying(out, "the site cannot be written"):
        for page in pages:
            for name, text in write.files(page).items():
                target = out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_file(target, text.encode("utf-8", "backslashreplace"), durable=False)
    if python:
        python.write(out)
    return len(pages)


def _refuse_other_folder(out: Path) -> None:
    front = out / "index.json"
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        mark = json.loads(front.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        mark = None
    if mark != _MARK:
        raise UserError(f"{out}: is not empty and no site that this command wrote: name another folder")


class _Writer:
    """What all pages share: templates, style, script and the policy that allows these two alone."""

    def __init__(self, *, diagnoses: bool) -> None:
        style, script = asset("report.css") + asset("site.css"), asset("lora.js") + asset("site.js")
        self._templates = environment()
        self._shared = {"style": style, "known_codes": CODES, "diagnoses": in_browser.ADDRESS if diagnoses else ""}
        self._plain = {"policy": policy(script, style), "script": script}
        script += asset("diagnose.js")
        self._starting = {"policy": f"{policy(script, style)}; worker-src 'self'", "script": script}

    def files(self, page: Page) -> dict[str, str]:
        """Return the files of a page by their addresses: the page, its data, its badge."""
        template = self._templates.get_template(f"site/{page.template}")
        own = self._starting if page.address == in_browser.ADDRESS else self._plain
        text = template.render(**self._shared, **own, page=page, root=page.root, **page.values)
        beside = page.address.removesuffix(".html") + ".json"
        return {page.address: text, beside: json.dumps(_plain(page.data), indent=1) + "\n", **page.extra}


def _plain(value: Any) -> Any:
    """Return a value for JSON in which no text moves a cursor or reorders a line."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(str(key)): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def site_pages(runs: Sequence[Run], *, diagnoses: bool = False) -> Iterator[Page]:
    """Yield every page, that which diagnoses a file if wanted; the front page, which has the index of all, last."""
    loaders = site_loaders(runs)
    pages = [*(_loader_page(one, loaders) for one in loaders), *map(_finding_page, findings().values())]
    pages += [_format_page(name, loaders) for name in FORMATS]
    pages += map(_code_page, CODES.values())
    pages += [in_browser.page({t.name: t.title for t in tools().values() if t.release})] if diagnoses else []
    yield from pages
    yield _front_page(runs, loaders, pages)


def _loader_page(loader: Loader, every: Sequence[Loader]) -> Page:
    values = {"loader": loader, "releases": releases_of(loader, every), "measured": committed(stem_of(loader)),
              "look": look, "alphas": ALPHAS, "asked": ASKED,
              "badge": Markup(badge(loader)), "state": badge_state(loader)}  # fmt: skip
    answers = [
        {"rank": rank, "alpha": alpha, "pass": number}
        for rank, numbers in loader.answers
        for alpha, number in zip(ALPHAS, numbers, strict=True)
    ]
    data = {
        "kind": "loader", "name": loader.name, "title": loader.title, "release": loader.release,
        "law": loader.formula or None, "as_trained": loader.right, "known": loader.provenance,
        "field": loader.argument or None, "answers": answers, "badge": badge_text(loader), "formats": loader.formats,
        "findings": [finding.page for finding in loader.findings], "reads": _reads_json(loader),
        "runs": [_seen_json(loader, number) for number in range(len(loader.seen))],
    }  # fmt: skip
    words = f"{loader.name} {loader.release} {loader.formula} {' '.join(loader.formats)} {loader.argument}"
    extra = {f"badges/{loader.slug}.svg": badge(loader) + "\n"}
    return Page(f"loaders/{loader.slug}.html", "loader", loader.label, "loader.html.j2", values, data, words, extra)


def _reads_json(loader: Loader) -> dict[str, dict[str, dict[str, list[str]]]]:
    return {place: {names: dict(found) for names, found in by_names} for place, by_names in loader.reads.items()}


def _seen_json(loader: Loader, number: int) -> dict[str, Any]:
    seen = loader.seen[number]
    cells = [
        {"format": c.format, "bench": c.bench, "variant": c.variant, "outcome": c.outcome, "law": c.formula,
         "code": c.worst.code if c.worst else None}
        for c in seen.line.cells
    ]  # fmt: skip
    return {"loader": seen.loader, "version": seen.version, "run": seen.run_id, "created": seen.created, "cells": cells}


def _finding_page(finding: Finding) -> Page:
    about = about_finding(finding)
    named = [tool for tool in finding.tools if tool in tools()]
    values = {"finding": finding, "about": about, "text": finding_html(finding.page), "tools": named}
    words = f"{' '.join(finding.codes)} {finding.loader} {' '.join(finding.tools)} {finding.says} {finding.effect}"
    return Page(
        f"findings/{finding.page}.html", "finding", about["title"], "finding.html.j2", values,
        {**about, "name": finding.page, "tools": finding.tools, "instead": finding.instead}, words,
    )  # fmt: skip


def _format_page(name: str, loaders: Sequence[Loader]) -> Page:
    form = FORMATS[name]
    readers = [loader for loader in loaders if name in loader.formats]
    data = {"kind": "format", "name": name, "example": form.example, "alpha": form.alpha, "halves": form.pairs,
            "loaders": {loader.name: loader.in_format(name) for loader in readers}}  # fmt: skip
    values = {"form": form, "readers": readers}
    return Page(f"formats/{name}.html", "format", f"{name} files", "format.html.j2", values, data, form.example)


def _code_page(code: Code) -> Page:
    about = about_code(code)
    leads = [symptom for symptom, codes in symptoms().items() if code.code in codes]
    values = {"code": code, "example": examples_of(code.code), "cases": findings_with(code.code), "leads": leads}
    words = f"{code.cause} {code.fix} {' '.join(leads)}"
    title = f"{code.code} {code.title}"
    return Page(f"codes/{code.code}.html", "code", title, "code.html.j2", values, {**about, "symptoms": leads}, words)


def _front_page(runs: Sequence[Run], loaders: Sequence[Loader], pages: Iterable[Page]) -> Page:
    index = [{"t": page.title, "u": page.address, "k": page.kind, "w": page.words} for page in pages]
    read = [loader for loader in loaders if loader.shares]
    places = list(dict.fromkeys(title_of(row["family"]) for row in every_read()))
    formats = [name for name in FORMATS if any(name in loader.formats for loader in loaders)]
    text = json.dumps(_plain(index), separators=(",", ":")).replace("<", "\\u003c")
    values = {
        "loaders": loaders, "tools": read, "places": places, "formats": formats, "asked": ASKED,
        "measured": measured_on(), "runs": sorted(runs, key=lambda run: run.header.created), "index": Markup(text),
        "findings": findings(), "codes": CODES, "state": badge_state, "badge_text": badge_text,
    }  # fmt: skip
    data = {"kind": _MARK, "runs": [run.header.run_id for run in runs], "pages": index}
    return Page("index.html", "front", "Which LoRA loader reads what", "front.html.j2", values, data)
