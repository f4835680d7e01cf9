"""The rows of an audit as one self-contained page: what is wrong how often, and every file with its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.doctor.audit.rows import AuditRow
from harness.report.lora_page import FILTERS, SIGNS, Shown
from harness.report.shell import asset, environment, policy
from harness.text import count
from harness.verdict.codes import CODES, Code


def render_audit_page(rows: Sequence[AuditRow]) -> str:
    """Return the page as HTML text: a pure function of the rows."""
    style, script = asset("report.css") + asset("lora.css"), asset("lora.js") + asset("audit.js")
    page = environment()
    page.filters |= FILTERS
    return page.get_template("audit.html.j2").render(
        files=[(row, Shown(row, "")) for row in rows],
        headline=_headline(rows),
        often=_often(rows),
        sign=SIGNS,
        policy=policy(script, style),
        style=style,
        script=script,
    )


def _headline(rows: Sequence[AuditRow]) -> str:
    unreadable = sum(not row.readable for row in rows)
    hazards = sum(bool(row.hazards) for row in rows) - unreadable
    copies = sum(row.duplicate_of is not None for row in rows)
    parts = [f"{len(rows) - hazards - unreadable:,} without hazards"]
    parts += [f"{hazards:,} with"] if hazards else []
    parts += [f"{unreadable:,} unreadable"] if unreadable else []
    parts += [f"{copies:,} with the weights of another"] if copies else []
    return f"{count(len(rows), 'LoRA file')}: {', '.join(parts)}"


def _often(rows: Sequence[AuditRow]) -> list[tuple[Code, int]]:
    """Return every hazard with the number of files that have it."""
    files = Counter(code for row in rows for code in set(row.codes))
    return [(CODES[code], times) for code, times in files.most_common()]
