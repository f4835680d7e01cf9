"""Write the tables of docs that come from data: `python -m benchmarks.tables` (a test holds them against it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import audit_growth
from harness.checks.releases import CellLaw, ReleaseLaw, changes
from harness.law.findings import findings
from harness.law.known import tools
from harness.law.reads import LABELS, every_row, kind_of, measured_on, title_of
from harness.law.released import TABLE as RELEASES
from harness.report.kept_releases import release_from
from harness.text import count, printable

DOCS = Path(__file__).parents[1] / "docs"
_RIGHT = "strength * alpha / rank"
_FINDINGS = """# Findings

Wrong or undocumented behaviour found in current releases of LoRA loaders. Each page has a script of its own that needs
only the loader; `tests/test_findings.py` runs it and compares its output. "Known" says what a search of the project's
issues found; "related" and "similar" are other effects of nearby code.

The rows are `harness/law/findings.toml`, which also says which files meet a finding: `inspect`, `diagnose` and `audit`
give no number for a file that a tool breaks. This page is written by `python -m benchmarks.tables`.

| page | loader | what | effect | codes | known upstream |
| --- | --- | --- | --- | --- | --- |
"""
_READS = """# What each tool reads

Measured on {measured} by `python -m benchmarks.reads`, which runs each tool's own code on a tiny model of every
architecture, for one alpha / rank in the whole file and for several. A spelling is prefix, halves and home of alpha:
`transformer.A.header` is `transformer.<module>.lora_A.weight` with alpha in the header. Names: the model's own (as
in diffusers), its authors' original ones, or sgm (Stable Diffusion's). Written by `python -m benchmarks.tables`.

| tool | architecture | names | what becomes of the spellings |
| --- | --- | --- | --- |
"""
_TOOLS = """# Tools

What `diagnose` knows of each tool (`harness/law/tools.toml`); written by `python -m benchmarks.tables`.

| tool | field | scale on B @ A | without alpha | alpha 0 | reads | known |
| --- | --- | --- | --- | --- | --- | --- |
"""

_RELEASES = """# Which release changed the law

What each release of a loader does with a LoRA: the scale that it puts on B @ A, identified from about ten planned
files, each release in a process that finds it first, with torch {torch} and otherwise the packages installed.
*Right* is strength · alpha / rank. Measured by `python -m benchmarks.releases`, written by
`python -m benchmarks.tables`. `lora-harness releases LOADER --install` does the same for any loader, range, format and
bench; `--files` says what it means for files of yours. Seconds hold starting the release (importing it) and all its
cells, on two cores that were busy with much other work; those of the processor say what a quiet machine takes.
{environments}

"""


def findings_page() -> str:
    """Return the index of `docs/findings`."""
    lines = [
        f"| [{f.page}]({f.page}.md) | {f.loader} {f.measured} | {f.what} | {f.effect} "
        f"| {', '.join(f.codes)} | {f.known} |\n"
        for f in findings().values()
    ]
    return _FINDINGS + "".join(lines) + "\n`lora-harness explain CODE` says what a code means.\n"


def reads_page() -> str:
    """Return what every tool was measured to read, a line per tool, architecture and naming."""
    by_place: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for row in every_row():
        place = (row["tool"], row["release"], row["family"], row["names"])
        found, mixed = kind_of(row["uniform"]), kind_of(row.get("mixed", row["uniform"]))
        label = LABELS[found] if found == mixed else f"{LABELS[found]}; ranks or alphas that differ: {LABELS[mixed]}"
        by_place.setdefault(place, {}).setdefault(label, []).append(row["scheme"])
    lines = []
    for (tool, release, family, names), labels in by_place.items():
        said = "<br>".join(f"**{label}**: {', '.join(schemes)}" for label, schemes in labels.items())
        lines.append(f"| {tool} {release} | {title_of(family)} | {names} | {said} |")
    return _READS.format(measured=measured_on()) + "\n".join(lines) + "\n"


def tools_page() -> str:
    """Return the tools, their fields and laws."""
    lines = []
    for tool in tools().values():
        if tool.release:
            law = tool.law.law.formula
            cells = (
                tool.title,
                f"`{tool.field}`",
                f"`{law}`",
                tool.without_alpha,
                tool.alpha_zero,
                ", ".join(tool.formats),
                tool.provenance,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return _TOOLS + "\n".join(lines) + "\n"


def releases_page() -> str:
    """Return the tables of releases, the newest first, and what changed where."""
    tables = json.loads(RELEASES.read_text(encoding="utf-8"))
    torch = ", ".join(sorted({table["versions"]["torch"] for table in tables}))
    sizes = {name: size for table in tables for name, size in table["bytes"].items()}.values()
    told = f"{len(sizes)} folders hold them and what some need beside them, {sum(sizes) / 1e6:.0f} MB together."
    return _RELEASES.format(torch=torch, environments=told) + "\n".join(_of_loader(table) for table in tables)


def _of_loader(table: Mapping[str, Any]) -> str:
    rows = list(map(release_from, table["releases"]))
    lines = [f"## {table['loader']}", f"{count(len(rows), 'release')}.", ""]
    lines += [f"- **{c.first}** {c.place}: {_escaped(c.before)} → {_escaped(c.after)}" for c in changes(rows)]
    places = list(dict.fromkeys(place for row in rows for place in row.states))
    lines += ["", f"| release | day | {' | '.join(places)} | s | CPU s |"]
    lines += [f"| --- | --- | {'--- | ' * len(places)}--- | --- |"]
    lines += [_release_row(each, places) for each in reversed(rows)]
    return "\n".join(lines) + "\n"


def _release_row(release: ReleaseLaw, places: list[str]) -> str:
    cells = {cell.place: cell for cell in release.cells}
    told = [_release_cell(cells[place]) if place in cells else "" for place in places]
    if release.problem:
        told[0] = f"{told[0]} {_escaped(release.problem)}".strip()
    cpu = f"{release.cpu:.0f}" if release.cpu else ""
    return f"| {release.version} | {release.day or ''} | {' | '.join(told)} | {release.seconds:.0f} | {cpu} |"


def _release_cell(cell: CellLaw) -> str:
    state = "**right**" + cell.state.removeprefix(_RIGHT) if cell.state.startswith(_RIGHT) else cell.state
    code = f" ({cell.code})" if cell.code else ""
    why = f": {printable(cell.why)}" if cell.why else ""
    return _escaped(f"{state}{code}{why}")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace(" * ", " · ")


PAGES = {
    "releases.md": releases_page,
    "findings/README.md": findings_page,
    "reads.md": reads_page,
    "tools.md": tools_page,
    "audit_growth.md": audit_growth.page,
}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
