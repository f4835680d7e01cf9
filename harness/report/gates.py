"""Compare a run with an earlier one: new violations, lost coverage, and numbers past a named rule close the gate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.errors import UserError
from harness.report.models import SweepRecord
from harness.report.records import Run
from harness.report.summary import place, short_title
from harness.text import on_one_line
from harness.verdict.verdict import Verdict

Direction = Literal["up", "down", "any"]
_RULE = re.compile(
    r"^(?P<field>[a-z_][a-z0-9_.]*):(?P<direction>up|down|any):(?P<threshold>\d+(\.\d*)?)(?P<percent>%?)$"
)
VERDICT_FIELDS = ("ratio", "measured_scale", "seconds", "estimated_factor", "survived", "modules_failed", "examples")
_RULE_HELP = (
    "a rule is FIELD:up|down|any:THRESHOLD, for example ratio:any:0.01, sweep.ssim_reference:down:0.02 or "
    f"seconds:up:20%; fields are {', '.join(VERDICT_FIELDS)}, run.seconds and sweep.METRIC"
)


@dataclass(frozen=True)
class Rule:
    """How far a number may move from the baseline; `relative` takes the threshold as a share of the old value."""

    field: str
    direction: Direction
    threshold: float
    relative: bool = False

    @property
    def name(self) -> str:
        """The rule as it is written on the command line."""
        amount = f"{self.threshold * 100:g}%" if self.relative else f"{self.threshold:g}"
        return f"{self.field}:{self.direction}:{amount}"

    def broken(self, before: float, after: float) -> bool:
        """Return True when the number moved too far in the rule's direction; a number that is no number always has."""
        if not math.isfinite(after):
            return math.isfinite(before)
        limit = self.threshold * (abs(before) if self.relative else 1.0)
        moved = {"up": after - before, "down": before - after, "any": abs(after - before)}[self.direction]
        return moved > limit


@dataclass(frozen=True)
class GateResult:
    """One reason why the gate is closed; `rule` is the name of what was broken."""

    rule: str
    where: str
    what: str

    def text(self) -> str:
        """Return the result as a line: rule, place, what happened."""
        return on_one_line(f"{self.rule}: {self.where}: {self.what}")


def parse_rule(text: str) -> Rule:
    """Read a rule such as `ratio:any:0.01` or `run.seconds:up:20%`.

    Raises:
        UserError: the text is no rule, or the field is unknown.
    """
    found = _RULE.match(text.strip())
    if found is None or not _known_field(found["field"]):
        raise UserError(f"rule={text!r}: {_RULE_HELP}")
    percent = bool(found["percent"])
    threshold = float(found["threshold"]) / (100 if percent else 1)
    return Rule(found["field"], found["direction"], threshold, percent)  # type: ignore[arg-type]  # the pattern's words


def _known_field(field: str) -> bool:
    return field in (*VERDICT_FIELDS, "run.seconds") or bool(re.match(r"sweep\.\w", field))


def require_whole(baseline: Run) -> Run:
    """Return a baseline that measured all that it set out to.

    Raises:
        UserError: it was cut short, or measured nothing: a gate against it would let through what it lacks.
    """
    if baseline.footer is None or baseline.cut or not (baseline.verdicts or _sweeps(baseline)):
        why = baseline.cut or ("it measured nothing" if baseline.footer else "it has no footer")
        raise UserError(f"{baseline.path or baseline.header.run_id}: is no baseline, {why}: run it again to its end")
    return baseline


def compare(baseline: Run, current: Run, rules: Sequence[Rule | str] = ()) -> list[GateResult]:
    """Return why `current` is worse than `baseline`, empty when the gate is open.

    A violation that is recorded as a known failure (outcome `xfailed`) is no violation. A cut run loses what it did
    not reach.

    Raises:
        UserError: a rule is none, the baseline is not whole, or cells of one of the runs were carried over.
    """
    require_whole(baseline)
    for run in (baseline, current):
        if run.carried:
            raise UserError(
                f"{run.path or run.header.run_id}: {sum(run.carried.values())} of its cells were carried over from an "
                "earlier run (--since): a gate needs runs that measured everything"
            )
    parsed = [parse_rule(rule) if isinstance(rule, str) else rule for rule in rules]
    results = [*_new_violations(baseline, current), *_lost_coverage(baseline, current)]
    for rule in parsed:
        results += _metrics(rule, baseline, current)
    if current.footer is None or current.cut:
        results.append(GateResult("whole run", "run", current.cut or "the run has no footer"))
    return results


def _new_violations(baseline: Run, current: Run) -> Iterator[GateResult]:
    old = {_violation(verdict) for verdict in baseline.verdicts if not verdict.ok}
    for verdict in current.verdicts:
        if not verdict.ok and _violation(verdict) not in old:
            old.add(_violation(verdict))
            yield GateResult("new violation", _where(verdict), short_title(verdict))


def _violation(verdict: Verdict) -> tuple[str | None, ...]:
    return (*_identity(verdict), verdict.code)


def _identity(verdict: Verdict) -> tuple[str | None, ...]:
    return verdict.loader, verdict.check, verdict.format, verdict.bench, verdict.variant


def _where(verdict: Verdict) -> str:
    return f"{verdict.loader} {place(verdict)}"


def _lost_coverage(baseline: Run, current: Run) -> Iterator[GateResult]:
    measured = {_identity(verdict) for verdict in current.verdicts if verdict.outcome != "skipped"}
    lost: dict[tuple[str, str], list[str]] = {}
    for verdict in baseline.verdicts:
        if verdict.outcome != "skipped" and _identity(verdict) not in measured:
            lost.setdefault((verdict.loader, place(verdict)), []).append(verdict.check)
    for (loader, where), checks in lost.items():
        names = ", ".join(dict.fromkeys(checks))
        yield GateResult("lost coverage", f"{loader} {where}", f"measured in the baseline, not measured now: {names}")
    yield from _lost_sweeps(baseline, current)


def _lost_sweeps(baseline: Run, current: Run) -> Iterator[GateResult]:
    now = set(_sweeps(current))
    for key in _sweeps(baseline):
        if key not in now:
            loader, lora, device, strength = key
            where = f"{loader} {lora} on {device}"
            yield GateResult("lost coverage", where, f"no pictures at strength {strength:g} now")


def _sweeps(run: Run) -> dict[tuple[str, str, str, float], SweepRecord]:
    return {(r.loader, r.lora.name, r.device.split(":")[0], r.strength): r for r in run.of(SweepRecord)}


def _metrics(rule: Rule, baseline: Run, current: Run) -> Iterator[GateResult]:
    before, after = _values(rule.field, baseline), _values(rule.field, current)
    for where, old in before.items():
        new = after.get(where)
        if new is not None and rule.broken(old, new):
            yield GateResult(rule.name, where, f"{rule.field} was {old:.4g}, is {new:.4g}")


def _values(field: str, run: Run) -> dict[str, float]:
    if field == "run.seconds":
        return {"run": run.footer.seconds} if run.footer else {}
    if field.startswith("sweep."):
        name = field.removeprefix("sweep.")
        found = [(f"{k[0]} {k[1]} on {k[2]} at {k[3]:g}", r.metrics.get(name)) for k, r in _sweeps(run).items()]
    else:
        found = [(f"{_where(verdict)} {verdict.check}", getattr(verdict, field)) for verdict in run.verdicts]
    return {where: float(value) for where, value in found if value is not None}
