"""Write a run as one self-contained `index.html`, a pure function of its records; and what every page shares."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from harness.outputs import replace_file, saying
from harness.report.links import code_link
from harness.report.matrix import LETTERS, law_shown, place_of, said
from harness.report.models import PowerRecord
from harness.report.power import families
from harness.report.records import Run, merge_runs, rebased
from harness.report.summary import (
    SYMBOLS,
    WORDS,
    headline,
    listed,
    loader_summaries,
    not_measured,
    pretty_formula,
    short_title,
)
from harness.report.view import STATUS_LOOKS, STATUS_WORDS, ReportView, grouped, told_lines
from harness.text import plain
from harness.verdict.file_record import FileRecord

if TYPE_CHECKING:
    from jinja2 import Environment

    from harness.report.gates import GateResult
    from harness.report.history import HistoryRecord

_PACKAGE = "harness.report"
_UNITS = ((2**30, "GiB"), (2**20, "MiB"))
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; "
    "base-uri 'none'; form-action 'none'; object-src 'none'"
)


def write_report(
    runs: Sequence[Run],
    out: Path | str,
    *,
    history: Sequence[HistoryRecord] | None = None,
    gate: Sequence[GateResult] | None = None,
) -> Path:
    """Write `out/index.html` from one or several runs and return its path.

    The machine-readable records lie beside it (`results.jsonl`, unless a run file is already in `out`), pictures that
    lie outside `out` are copied to `out/images`. `history` is the list that `read_history` returns; `gate` what
    `compare` returns (None: the run was not compared, empty: the gate is open).

    Raises:
        UserError: there is no run, or `out` cannot be written.
    """
    out, run = Path(out), merge_runs(runs)
    if run.path is None or run.path.resolve().parent != out.resolve():
        run = rebased(run)
    with saying(out, "the report cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        page = render(run, out, history=history or (), gate=gate, data=_machine_data(run, out))
        replace_file(out / "index.html", page.encode("utf-8"))
    return out / "index.html"


def render(
    run: Run,
    out: Path,
    *,
    history: Sequence[HistoryRecord] = (),
    gate: Sequence[GateResult] | None = None,
    data: str | None = None,
) -> str:
    """Return the report of a run as HTML text; `out` is the folder that it will lie in, `data` a link beside it."""
    from harness.report.history import Trend
    from harness.report.strips import strips

    style, script = asset("report.css"), asset("report.js")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            view=ReportView(run),
            strips=strips(run, out),
            trend=Trend(history),
            gate=gate,
            files=run.of(FileRecord),
            powers=run.of(PowerRecord),
            power_families=families(run.of(PowerRecord)),
            unmeasured=not_measured(run),
            headline=headline(run),
            findings=loader_summaries(run),
            policy=policy(script, style),
            style=style,
            script=script,
            data=data,
        )
    )


def _machine_data(run: Run, out: Path) -> str:
    """Return the link to the records beside the report, writing them when no run file lies there."""
    if run.path is not None:
        return quote(run.path.name)
    lines = [run.header, *run.records, *([run.footer] if run.footer else [])]
    text = "".join(line.model_dump_json() + "\n" for line in lines)
    replace_file(out / "results.jsonl", text.encode("utf-8"))
    return "results.jsonl"


def when(stamp: str) -> str:
    """Return an ISO time stamp as `23 November 2026, 20:15 UTC`, or as it is when it is none."""
    try:
        time = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".strip()


def sized(count: float | None) -> str:
    """Return a number of bytes, large ones in MiB or GiB."""
    if count is None:
        return "–"
    return next((f"{count / unit:,.1f} {name}" for unit, name in _UNITS if count >= unit), f"{count:,} bytes")


def environment() -> Environment:
    """Return the templates of the report: escaped, strict, and with hostile characters shown as escapes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    shared = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    shared.filters |= {"number": number, "formula": pretty_formula, "when": when, "sized": sized}
    shared.globals |= {
        "symbol": SYMBOLS.__getitem__,
        "word": WORDS.__getitem__,
        "told": told_lines,
        "short_title": short_title,
        "listed": listed,
        "said": said,
        "law_shown": law_shown,
        "place_of": place_of,
        "grouped": grouped,
        "letter": LETTERS,
        "code_link": code_link,
        "status_word": STATUS_WORDS,
        "status_look": STATUS_LOOKS,
    }
    return shared


def asset(name: str) -> Any:
    """Return a file that lies beside the templates, to be put into the page as it is."""
    from markupsafe import Markup

    text = (files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8")
    return Markup(text)


def policy(script: str, style: str) -> str:
    """Return the content security policy that allows this script and this style alone."""
    return _POLICY.format(script=_hashed(script), style=_hashed(style))


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def _finalized(value: Any) -> Any:
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return plain(value)
    return "" if value is None else value


def _hashed(text: str) -> str:
    digest = hashlib.sha256(str(text).encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
