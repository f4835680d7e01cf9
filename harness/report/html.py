"""Write a run as one self-contained `index.html`: a pure function of the run's records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from harness.errors import UserError
from harness.report import shell
from harness.report.models import PowerRecord
from harness.report.records import Run, merge_runs, rebased
from harness.report.summary import headline, listed, loader_summaries, not_measured, pretty_formula, short_title
from harness.report.view import STATUS_LOOKS, STATUS_WORDS, ReportView, symbol, told_lines, word
from harness.verdict.file_record import FileRecord

if TYPE_CHECKING:
    from jinja2 import Environment

    from harness.report.gates import GateResult
    from harness.report.history import HistoryRecord


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
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = render(run, out, history=history or (), gate=gate, data=_machine_data(run, out))
        target = out / "index.html"
        partial = out / "index.html.part"
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written: {error.strerror or error}") from None
    return target


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

    style, script = shell.asset("report.css"), shell.asset("report.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            view=ReportView(run),
            strips=strips(run, out),
            trend=Trend(history),
            gate=gate,
            files=run.of(FileRecord),
            powers=run.of(PowerRecord),
            unmeasured=not_measured(run),
            headline=headline(run),
            findings=loader_summaries(run),
            policy=shell.policy(script, style),
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
    (out / "results.jsonl").write_text(text, encoding="utf-8")
    return "results.jsonl"


def _environment() -> Environment:
    environment = shell.environment()
    environment.filters |= {"number": shell.number, "formula": pretty_formula, "when": when, "sized": sized}
    environment.globals |= {
        "symbol": symbol,
        "word": word,
        "told": told_lines,
        "short_title": short_title,
        "listed": listed,
        "status_word": STATUS_WORDS,
        "status_look": STATUS_LOOKS,
    }
    return environment


def when(stamp: str) -> str:
    """Return an ISO time stamp as `23 November 2026, 20:15 UTC`, or as it is when it is none."""
    try:
        time = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".strip()


def sized(count: float | None) -> str:
    """Return a number of bytes in MiB or GiB."""
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
