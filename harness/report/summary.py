"""What a run means: one sentence, a matrix of cells, failures folded by cause and sorted worst first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.loaders.protocol import CORE_BENCHES, CORE_FORMATS
from harness.report.models import PartRecord, PowerRecord, ProbeRecord, SweepRecord
from harness.report.records import Run
from harness.report.since import carried_sentence
from harness.text import count, on_one_line
from harness.verdict.file_record import FileRecord
from harness.verdict.verdict import REFERENCE, LawRecord, Verdict

WORDS = {
    "failed": "wrong",
    "errored": "crashed",
    "refused": "refused",
    "xpassed": "fixed?",
    "xfailed": "known",
    "passed": "right",
    "skipped": "not measured",
    "none": "not measured",
}
SYMBOLS = {
    "failed": "✕",
    "errored": "!",
    "refused": "⊘",
    "xpassed": "↑",
    "xfailed": "≈",
    "passed": "✓",
    "skipped": "–",
    "none": "–",
}
OUTCOMES = ("failed", "errored", "refused", "xpassed", "xfailed", "passed", "skipped")
_DECIDES = (*OUTCOMES, "none")
_FOLDED_FIRST = 3
_MOST_LOADERS = 4
CellKey = tuple[str, str, str, str]  # loader, format, bench, variant


@dataclass(frozen=True)
class MatrixCell:
    """One loader on one format, bench and variant."""

    loader: str
    format: str
    bench: str
    variant: str
    verdicts: tuple[Verdict, ...]
    law: LawRecord | None = None

    @cached_property
    def outcome(self) -> str:
        """The worst outcome in the cell; `none` without verdicts."""
        return min((verdict.outcome for verdict in self.verdicts), key=_DECIDES.index, default="none")

    @cached_property
    def worst(self) -> Verdict | None:
        """The verdict that decides the cell."""
        return min(self.verdicts, key=badness, default=None)

    @property
    def ordered(self) -> list[Verdict]:
        """The verdicts, the worst first."""
        return sorted(self.verdicts, key=badness)

    @property
    def anchor(self) -> str:
        """The cell's stable id inside a report."""
        return "cell-" + digest(self.loader, self.format, self.bench, self.variant)

    @property
    def formula(self) -> str | None:
        """What was measured as printed: the law, for example `strength · alpha / rank`, or the factor from pictures."""
        if self.law:
            return pretty_formula(self.law.formula)
        factor = self.worst.estimated_factor if self.worst else None
        return None if factor is None else f"{factor:.3g}× as trained"


@dataclass(frozen=True)
class FailureGroup:
    """Failures with one cause: the worst of them first, told in full, the rest named."""

    verdicts: tuple[Verdict, ...]

    @property
    def worst(self) -> Verdict:
        """The verdict whose text is shown."""
        return self.verdicts[0]

    def also(self) -> str:
        """Return the sentence that names the other places, empty when there is none."""
        others = list(dict.fromkeys(place(verdict) for verdict in self.verdicts[1:]))
        others = [other for other in others if other != place(self.worst)]
        return f"the same in {listed(others, _FOLDED_FIRST)}" if others else ""


def pretty_formula(formula: str) -> str:
    """Return a law's formula with multiplication as a middle dot, made safe to print."""
    return on_one_line(formula.replace(" * ", " · "), 120)


def place(verdict: Verdict) -> str:
    """Return where a verdict was measured, as `format/bench`, with the variant unless it is a plain LoRA."""
    parts = [verdict.format, verdict.bench, verdict.variant if verdict.variant != "lora" else None]
    return on_one_line("/".join(part for part in parts if part) or verdict.check)


def digest(*parts: object) -> str:
    """Return a short id that is the same in every run with the same parts."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:10]


def badness(verdict: Verdict) -> tuple[int, float, float]:
    """Sort key, worst first: by outcome, then how far off the scale is, then the share of modules that fail."""
    share = (verdict.modules_failed or 0) / (verdict.modules_total or 1)
    return _DECIDES.index(verdict.outcome), -distance(verdict.ratio), -share


def distance(ratio: float | None) -> float:
    """Return how far a ratio is from 1 in doublings; nothing loaded and a wrong sign count as far off."""
    if ratio is None:
        return 0.0
    if not math.isfinite(ratio) or ratio <= 0:
        return 64.0
    return abs(math.log2(ratio))


def causes(verdicts: Iterable[Verdict]) -> list[FailureGroup]:
    """Fold the violations of one loader with one code and one law together.

    The loader that is furthest off comes first; of each loader the cause that has a law, which explains the others,
    then the worst.
    """
    folded: dict[tuple[object, ...], list[Verdict]] = {}
    for verdict in sorted((v for v in verdicts if not v.ok), key=badness):
        law = verdict.law.formula if verdict.law else None
        key = (verdict.loader, verdict.loader_version, verdict.outcome, verdict.code or verdict.title, law)
        folded.setdefault(key, []).append(verdict)
    found = [FailureGroup(tuple(group)) for group in folded.values()]
    order = {loader: i for i, loader in reversed(list(enumerate(cause.worst.loader for cause in found)))}
    return sorted(found, key=lambda cause: (order[cause.worst.loader], cause.worst.law is None))


def cells(run: Run) -> dict[CellKey, MatrixCell]:
    """Return the cells that were measured, by loader, format, bench and variant."""
    found: dict[CellKey, list[Verdict]] = {}
    for verdict in run.verdicts:
        if verdict.format is not None:
            key = (verdict.loader, _column(verdict), verdict.bench or "", verdict.variant)
            found.setdefault(key, []).append(verdict)
    laws = {(p.loader, p.format or "", p.bench or "", p.variant): p.law for p in run.of(ProbeRecord) if p.law}
    whole = {key: MatrixCell(*key, tuple(group), laws.get(key) or _law(group)) for key, group in found.items()}
    return dict(sorted(whole.items(), key=_order(run, list(whole))))


def _column(verdict: Verdict) -> str:
    """Return the column of the matrix: the format, one of its own for what is dropped without a word."""
    return verdict.check if verdict.check == "silence" else verdict.format or ""


def _order(run: Run, keys: Sequence[CellKey]) -> Callable[[tuple[CellKey, MatrixCell]], tuple[int, ...]]:
    """Sort key of cells: loaders as planned, then formats and benches, the core ones first; pictures last."""
    planned = [part.partition(":")[2].partition("@")[0] for part in run.header.planned]
    loaders, formats, benches = (
        list(dict.fromkeys([*first, *(key[i] for key in keys)]))
        for i, first in enumerate((planned, CORE_FORMATS, CORE_BENCHES))
    )

    def order(entry: tuple[CellKey, MatrixCell]) -> tuple[int, ...]:
        (loader, fmt, bench, _), cell = entry
        pictures = all(verdict.check == "images" for verdict in cell.verdicts)
        return loaders.index(loader), int(pictures), benches.index(bench), formats.index(fmt)

    return order


@dataclass(frozen=True)
class MatrixRow:
    """One line of the matrix: a loader on one bench and variant, a cell per format (None: not measured)."""

    loader: str
    bench: str
    variant: str
    cells: tuple[MatrixCell | None, ...]

    @property
    def name(self) -> str:
        """The bench, the variant, `images` where only pictures spoke."""
        seen = {verdict.check for cell in self.cells if cell for verdict in cell.verdicts}
        extra = [self.variant] if self.variant != "lora" else []
        return " · ".join([self.bench, *extra, *(["images"] if seen == {"images"} else [])])


def matrix_rows(grid: Mapping[CellKey, MatrixCell]) -> list[MatrixRow]:
    """Return the lines of the matrix: loaders and benches as they came, plain LoRA before variants."""
    lines = list(dict.fromkeys((loader, bench, variant) for loader, _, bench, variant in grid))
    loaders, benches = (list(dict.fromkeys(line[i] for line in lines)) for i in (0, 1))
    lines.sort(key=lambda line: (loaders.index(line[0]), benches.index(line[1]), line[2] != "lora", line[2]))
    formats = matrix_columns(grid)
    return [MatrixRow(*line, tuple(grid.get((line[0], fmt, *line[1:])) for fmt in formats)) for line in lines]


def matrix_columns(grid: Mapping[CellKey, MatrixCell]) -> list[str]:
    """Return the formats that were measured, the core formats first."""
    found = dict.fromkeys(fmt for _, fmt, _, _ in grid)
    return [*(fmt for fmt in CORE_FORMATS if fmt in found), *(fmt for fmt in found if fmt not in CORE_FORMATS)]


def _law(verdicts: Sequence[Verdict]) -> LawRecord | None:
    return next((verdict.law for verdict in sorted(verdicts, key=badness) if verdict.law is not None), None)


@dataclass(frozen=True)
class LoaderSummary:
    """What is wrong with one loader, in a line."""

    loader: str
    worst: Verdict
    more: int

    def text(self) -> str:
        """Return `diffsynth-2.0.4: alpha ignored (LH202), law strength, and 2 more`."""
        law = f", law {pretty_formula(self.worst.law.formula)}" if self.worst.law else ""
        more = f", and {self.more} more" if self.more else ""
        return f"{on_one_line(self.loader)}: {short_title(self.worst)}{law}{more}"


def sentence(run: Run) -> str:
    """Return the verdict on the whole run: what was found, by whom (the worst first), and what was not measured."""
    found = loader_summaries(run)
    more = [f"and {count(len(found) - _MOST_LOADERS, 'more loader')}"] if len(found) > _MOST_LOADERS else []
    told = "; ".join([*(summary.text() for summary in found[:_MOST_LOADERS]), *more])
    missing = f"Not measured: {listed([on_one_line(part.name) for part in run.missing])}." if run.missing else ""
    return " ".join(part for part in (headline(run), told and f"{told}.", missing, carried_sentence(run)) if part)


def headline(run: Run) -> str:
    """Return the first sentence of the verdict, without the loaders' names."""
    cut = "" if run.footer and not run.cut else "This run was cut short, so nothing in it counts as a pass. "
    if run.footer and run.footer.gate:
        cut += f"Worse than the baseline: {run.footer.gate[0]}{_more(run.footer.gate)}. "
    wrong = {verdict.loader for verdict in run.verdicts if not verdict.ok}
    if wrong == {REFERENCE}:
        return f"{cut}PEFT's own merge is not what the closed form says: what is held against both is in doubt."
    wrong -= {REFERENCE}
    tested = {v.loader for v in run.verdicts if v.outcome != "skipped"} | {s.loader for s in run.of(SweepRecord)}
    tested -= {REFERENCE}
    if wrong and all(verdict.ok or verdict.outcome == "refused" for verdict in run.verdicts):
        return f"{cut}{listed([on_one_line(name) for name in wrong])} refuses files that it declares."
    if len(tested) == 1 and wrong:
        return f"{cut}The loader does not reproduce the training."
    if wrong:
        verb = "does" if len(wrong) == 1 else "do"
        return f"{cut}{len(wrong)} of {len(tested)} loaders {verb} not reproduce the training."
    if any(verdict.outcome in ("passed", "xfailed") for verdict in run.verdicts):
        return cut + _all_right(run, len(tested)) + _but(run)
    return cut + (_files(run) or power_sentence(run.of(PowerRecord)) or "Nothing was measured.")


def _more(lines: Sequence[str]) -> str:
    return f", and {len(lines) - 1} more" if len(lines) > 1 else ""


def _but(run: Run) -> str:
    verb = "was" if len(run.missing) == 1 else "were"
    return f" But {count(len(run.missing), 'planned part')} {verb} not measured." if run.missing else ""


def loader_summaries(run: Run) -> list[LoaderSummary]:
    """Return one summary per loader with violations, the worst loader first."""
    by_loader: dict[str, list[FailureGroup]] = {}
    for cause in causes(run.verdicts):
        by_loader.setdefault(cause.worst.loader, []).append(cause)
    worst = ((name, found[0].worst, len(found) - 1) for name, found in by_loader.items())
    return [LoaderSummary(name, verdict, more) for name, verdict, more in worst]


def _all_right(run: Run, tested: int) -> str:
    passed = run.counts.get("passed", 0)
    known = sorted({on_one_line(verdict.loader) for verdict in run.verdicts if verdict.outcome == "xfailed"})
    if known:
        some = f"{count(run.counts['xfailed'], 'known failure')} in {', '.join(known)}"
        return f"Nothing new is wrong: {passed} checks passed, {some}.{_seen(run)}"
    who = "The loader reproduces" if tested == 1 else f"All {tested} loaders reproduce"
    return f"{who} the training: {passed} checks passed.{_seen(run)}"


def _seen(run: Run) -> str:
    """Say how much a green line rests on: examples, dtypes, formats, benches, variants; empty for pictures."""
    judged = [verdict for verdict in run.verdicts if verdict.format is not None and verdict.examples]
    cells: dict[tuple[str | None, ...], int] = {}
    for v in judged:  # what is known to fail is tried alone, on fewer
        key = (v.loader, v.format, v.bench, v.variant)
        cells[key] = max(cells.get(key, 0), v.examples or 0)
    dtypes = {name for v in judged for kind in ("model_dtypes", "file_dtypes") for name in v.data.get(kind, ())}
    if not cells or not dtypes:
        return ""
    formats, benches, variants = ({key[place] for key in cells} for place in (1, 2, 3))
    places = (count(len(formats), "format"), _benches(len(benches)), count(len(variants), "variant"))
    return f" Seen: {count(sum(cells.values()), 'example')} in {listed(sorted(dtypes))}; {', '.join(places)}."


def _benches(number: int) -> str:
    return f"{number} bench{'es' if number != 1 else ''}"


def _files(run: Run) -> str:
    files = run.of(FileRecord)
    if not files:
        return ""
    bad = sum(bool(record.hazards) for record in files)
    return f"{bad} of {len(files)} LoRA files carry hazards." if bad else f"No hazard in {len(files)} LoRA files."


def power_sentence(records: Sequence[PowerRecord]) -> str:
    """Say how many of the faults put in on purpose were found and named, and how often a right loader was blamed."""
    right = [record for record in records if record.factor == 1]
    wrong = [record for record in records if record.factor != 1]
    faults, found = sum(r.trials for r in wrong), sum(r.detected for r in wrong)
    named = sum(r.detected if r.named is None else r.named for r in wrong)
    alarms, trials = sum(r.detected for r in right), sum(r.trials for r in right)
    told = [f"{found:,} of {faults:,} faults found, {named:,} named right"] if wrong else []
    told += [f"{alarms:,} false alarms in {trials:,} examples of {count(len(right), 'right loader')}"] if right else []
    return f"{'; '.join(told)}." if told else ""


def short_title(verdict: Verdict) -> str:
    """Return a verdict's title up to the measured fact, with the code: `alpha ignored (LH202)`."""
    whole = (verdict.title or f"{verdict.check} {verdict.outcome}").partition(" only where: ")[0]
    title = on_one_line(whole.split(": ")[0], 80)
    return f"{title} ({verdict.code})" if verdict.code else title


def listed(words: Sequence[str], limit: int = 4) -> str:
    """Join words by commas, the ones past `limit` counted."""
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more


def not_measured(run: Run) -> list[PartRecord]:
    """Return every part that was planned and did not run or was skipped, each reason once per loader."""
    skipped: dict[tuple[str, str], list[str]] = {}
    for verdict in run.verdicts:
        if verdict.outcome == "skipped":
            skipped.setdefault((verdict.loader, verdict.reason or "skipped"), []).append(verdict.check)
    folded = (
        PartRecord(name=f"{loader} {listed(list(dict.fromkeys(checks)))}", measured=False, reason=reason)
        for (loader, reason), checks in skipped.items()
    )
    return [*run.missing, *folded]
