"""Write the tables of docs that come from data: `python -m benchmarks.tables` (a test holds them against it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.law.findings import findings
from harness.law.known import tools
from harness.law.reads import TABLE, title_of

DOCS = Path(__file__).parents[1] / "docs"
_LABEL = {
    "ok": "as trained", "nothing": "nothing loaded", "raises": "raises", "hangs": "hangs",
    "alpha ignored": "alpha ignored", "magnitudes ignored": "magnitudes ignored",
    "partly": "some layers only", "depends": "depends on the layers",
}  # fmt: skip
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


def findings_page() -> str:
    """Return the index of `docs/findings`."""
    lines = [
        f"| [{f.page}]({f.page}.md) | {f.loader} {f.measured} | {f.what} | {f.effect} "
        f"| {', '.join(f.codes)} | {f.known} |\n"
        for f in findings().values()
    ]
    return _FINDINGS + "".join(lines) + "\n`lora-harness explain CODE` says what a code means.\n"


def kind_of(outcome: Any) -> str:
    """Return one word for what was measured of a spelling."""
    if isinstance(outcome, str):
        return outcome
    if "all" in outcome:
        return "depends"
    return next((kind for kind in ("raises", "hangs") if kind in outcome), "partly")


def reads_page() -> str:
    """Return what every tool was measured to read, a line per tool, architecture and naming."""
    table: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    by_place: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for row in table["rows"]:
        place = (row["tool"], row["release"], row["family"], row["names"])
        found, mixed = kind_of(row["uniform"]), kind_of(row.get("mixed", row["uniform"]))
        label = _LABEL[found] if found == mixed else f"{_LABEL[found]}; ranks or alphas that differ: {_LABEL[mixed]}"
        by_place.setdefault(place, {}).setdefault(label, []).append(row["scheme"])
    lines = []
    for (tool, release, family, names), found in by_place.items():
        said = "<br>".join(f"**{label}**: {', '.join(schemes)}" for label, schemes in found.items())
        lines.append(f"| {tool} {release} | {title_of(family)} | {names} | {said} |")
    return _READS.format(measured=table["measured"]) + "\n".join(lines) + "\n"


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


PAGES = {"findings/README.md": findings_page, "reads.md": reads_page, "tools.md": tools_page}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
