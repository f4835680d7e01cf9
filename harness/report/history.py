"""One line per run, kept for ever: trends and flips over nights, merged from several machines without a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from packaging.version import Version
from pydantic import Field, ValidationError

from harness.errors import UserError
from harness.outputs import LineWriter, damaged, only_writer, read_lines, saying, tell
from harness.report.records import VIOLATIONS, Run, first_problem
from harness.report.summary import OUTCOMES, SYMBOLS, WORDS, MatrixCell, cells, listed
from harness.text import count, elided, on_one_line
from harness.verdict.verdict import Record

_GREEN = "passed"  # a failure that is recorded as known is no better than it was
_PATIENCE = 30.0  # seconds that another run may take to add its line
_LAST = 30
_NAME = 32
_MOST_FLIPS = 20
_HEIGHT = 48.0


class HistoryCell(Record):
    """The key numbers of one cell: outcome, code and law of its worst verdict, ratio measured / expected."""

    loader: str
    version: str | None = None
    format: str
    bench: str
    variant: str = "lora"
    outcome: str
    code: str | None = None
    law: str | None = None
    ratio: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the cell is about; the same key in two runs is compared."""
        return self.loader, self.format, self.bench, self.variant


class HistoryRecord(Record):
    """One run in the history, or with `release` what that release of a loader does."""

    kind: Literal["history"] = "history"
    run_id: str
    created: str
    status: str
    release: str | None = None
    commit: str | None = None
    machine: str = ""
    device: str = "cpu"
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    seconds: float | None = None
    cells: tuple[HistoryCell, ...] = ()


@dataclass(frozen=True)
class Flip:
    """A cell, or several alike, that changed from one run to the next."""

    loader: str
    before: tuple[str | None, str, str | None]
    after: tuple[str | None, str, str | None]
    created: str
    run_id: str
    places: tuple[str, ...]

    @property
    def direction(self) -> str:
        """`worse` when what was right is not any more, `better` when it is right now, else `changed`."""
        before, after = (state[1] == _GREEN for state in (self.before, self.after))
        return "changed" if before == after else "better" if after else "worse"

    def text(self) -> str:
        """Return the flip as a line, for example "acme 1.0 -> 1.1: law `strength` -> `strength * alpha` (peft)"."""
        (old, was, old_law), (new, now, new_law) = self.before, self.after
        versions = f" {old} -> {new}" if old and new and old != new else f" {new or old}" if new or old else ""
        changes = [f"law `{old_law}` -> `{new_law}`"] if old_law and new_law and old_law != new_law else []
        changes += [f"{WORDS.get(was, was)} -> {WORDS.get(now, now)}"] if was != now or not changes else []
        return on_one_line(f"{self.loader}{versions}: {', '.join(changes)} ({listed(self.places)})")


def history_record(run: Run) -> HistoryRecord:
    """Return the key numbers of a run."""
    header = run.header
    return HistoryRecord(
        run_id=header.run_id,
        created=header.created,
        status=run.status,
        commit=header.commit,
        machine=header.machine,
        device=header.device,
        seed=header.seed,
        versions=header.versions,
        counts=run.counts,
        seconds=run.footer.seconds if run.footer else None,
        cells=tuple(_key_numbers(cell) for cell in cells(run).values()),
    )


def _key_numbers(cell: MatrixCell) -> HistoryCell:
    worst = cell.worst
    return HistoryCell(
        loader=cell.loader,
        version=next((v.loader_version for v in cell.verdicts if v.loader_version), None),
        format=cell.format,
        bench=cell.bench,
        variant=cell.variant,
        outcome=cell.outcome,
        code=worst.code if worst else None,
        law=cell.law.formula if cell.law else None,
        ratio=next((v.ratio for v in (worst, *cell.verdicts) if v is not None and v.ratio is not None), None),
    )


def append_history(path: Path | str, run: Run) -> HistoryRecord:
    """Append the run to the history file, once: a run that is already there is not added again.

    Raises:
        UserError: the file is no history file or cannot be written.
    """
    record = history_record(run)
    append_records(path, [record])
    return record


def append_records(path: Path | str, records: Sequence[HistoryRecord]) -> None:
    """Append records to the history file, those whose ids it has not.

    Raises:
        UserError: the file is no history file or cannot be written.
    """
    path = Path(path)
    with only_writer(path, seconds=_PATIENCE), saying(path, "the history cannot be written"):
        known = {record.run_id for record in read_history(path)} if path.exists() else set()
        new = [record for record in records if record.run_id not in known]
        if new:
            with closing(LineWriter(path)) as lines:
                for record in new:
                    lines.write(record.model_dump_json())


def read_history(*paths: Path | str) -> list[HistoryRecord]:
    """Read and merge history files of any number of machines: one record per run id, the oldest first.

    The order of the files does not matter. A line that was cut or damaged is told of on stderr and passed over.

    Raises:
        UserError: a file cannot be read or a line is another record (file and line are named).
    """
    files = sorted((_read(Path(path)) for path in paths), key=lambda records: [record.run_id for record in records])
    return merge_history(record for records in files for record in records)


def merge_history(records: Iterable[HistoryRecord]) -> list[HistoryRecord]:
    """Return the union of records by run id, sorted by time, those of one time as they came; the last of an id wins."""
    union = {record.run_id: record for record in records}
    return sorted(union.values(), key=lambda record: record.created)


def _read(path: Path) -> list[HistoryRecord]:
    records: list[HistoryRecord] = []
    broken: list[int] = []
    with saying(path, "the history cannot be read"):
        for number, line in read_lines(path):
            try:
                records.append(HistoryRecord.model_validate_json(line))
            except ValidationError as error:
                if error.errors()[0]["type"] != "json_invalid":
                    raise UserError(f"{path}:{number}: not a history record: {first_problem(error)}") from None
                broken.append(number)
    if broken and not records:
        raise UserError(f"{path}:{broken[0]}: not a history record: no line of it is JSON")
    if broken:
        tell(damaged(path, broken, f"{count(len(records), 'run')} kept"))
    return records


def flips(history: Sequence[HistoryRecord]) -> list[Flip]:
    """Return what changed from one run to the next on the same kind of device, the newest first.

    A cell that a run did not measure is compared with the last run that did. Releases of a loader are compared with one
    another, by their versions, whenever they were measured.
    """
    last: dict[tuple[str, ...], HistoryCell] = {}
    found: list[Flip] = []
    runs = merge_history(history)
    ordered = [run for run in runs if run.release is None]
    ordered += sorted((run for run in runs if run.release), key=lambda run: Version(run.release or "0"))
    for record in ordered:
        changed: dict[tuple[object, ...], list[tuple[HistoryCell, HistoryCell]]] = {}
        for cell in record.cells:
            key = ("release" if record.release else record.device.split(" ")[0], *cell.key)
            before = last.get(key)
            if cell.outcome == "skipped":
                continue
            last[key] = cell
            if before is not None and _state(before)[1:] != _state(cell)[1:]:
                changed.setdefault((cell.loader, _state(before), _state(cell)), []).append((before, cell))
        found += [_flip(record, pairs) for pairs in changed.values()]
    newest = found[::-1]
    newest.sort(key=lambda flip: flip.created, reverse=True)
    return newest


def _state(cell: HistoryCell) -> tuple[str | None, str, str | None]:
    return cell.version, cell.outcome, cell.law


def _flip(record: HistoryRecord, pairs: list[tuple[HistoryCell, HistoryCell]]) -> Flip:
    before, after = pairs[0]
    places = tuple(dict.fromkeys(f"{cell.format}/{cell.bench}" if cell.bench else cell.format for _, cell in pairs))
    return Flip(after.loader, _state(before), _state(after), record.created, record.run_id, places)


def history_text(history: Sequence[HistoryRecord], last: int = 30) -> str:
    """Return the history as printed by `lora-harness history`: a line per run, a line per loader, then the flips."""
    records = merge_history(history)[-last:]
    lines = [_line(record) for record in records]
    trends = _trends(records) if len(records) > 1 else []
    lines += ["", "by loader, the oldest run first (· not measured)", *trends] if trends else []
    changed = [f"  {flip.created[:10]}  {flip.text()}" for flip in flips(history)]
    return "\n".join(map(on_one_line, [*lines, *(["", "changes, the newest first", *changed] if changed else [])]))


def by_loader(records: Sequence[HistoryRecord]) -> list[tuple[str, list[tuple[HistoryRecord, str | None]]]]:
    """Return for each loader its worst outcome in each run, None where it was not measured."""
    names = dict.fromkeys(cell.loader for record in records for cell in record.cells)
    return [(name, [(record, _worst(record, name)) for record in records]) for name in names]


def _worst(record: HistoryRecord, loader: str) -> str | None:
    outcomes = {cell.outcome for cell in record.cells if cell.loader == loader} - {"skipped"}
    return next((outcome for outcome in OUTCOMES if outcome in outcomes), None)


def _trends(records: Sequence[HistoryRecord]) -> list[str]:
    """Return a line per loader with a sign per run, the oldest first."""
    found = by_loader(records)
    width = max((len(elided(name, _NAME)) for name, _ in found), default=0)
    return [f"  {elided(name, _NAME):<{width}}  {''.join(map(_sign, outcomes))}" for name, outcomes in found]


def _sign(seen: tuple[HistoryRecord, str | None]) -> str:
    return SYMBOLS.get(seen[1] or "", "·")


def _line(record: HistoryRecord) -> str:
    if record.release:
        lead = f"{record.created[:16]}  {record.status:<10}"
        return f"{lead}  release {record.release} of {', '.join(dict.fromkeys(cell.loader for cell in record.cells))}"
    counted = f"{_counted(record.counts):<40}"
    return f"{record.created[:16]}  {record.status:<10}  {counted}  {record.commit or '-':<12}  {record.machine}"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()) if number) or "no verdict"


@dataclass(frozen=True)
class BarPart:
    """One outcome's share of a bar: `top` and `height` in units of the drawing."""

    outcome: str
    count: int
    top: float
    height: float


@dataclass(frozen=True)
class RunBar:
    """One run: its outcomes stacked, violations at the foot where they line up from night to night."""

    record: HistoryRecord
    parts: tuple[BarPart, ...]

    @property
    def violations(self) -> int:
        """Failed, errored and unexpectedly passing checks together."""
        return sum(self.record.counts.get(outcome, 0) for outcome in VIOLATIONS)


class Trend:
    """The bars and flips of a history; empty with fewer than two runs."""

    height = _HEIGHT

    def __init__(self, history: Sequence[HistoryRecord]) -> None:
        self.history = history

    @cached_property
    def bars(self) -> list[RunBar]:
        """The last runs, oldest first, scaled to the largest of them."""
        records = [run for run in merge_history(self.history) if run.release is None][-_LAST:]
        most = max((sum(record.counts.values()) for record in records), default=0) or 1
        return [RunBar(record, _parts(record, most)) for record in records] if len(records) > 1 else []

    @cached_property
    def loaders(self) -> list[tuple[str, list[tuple[HistoryRecord, str | None]]]]:
        """(loader, (run, its worst outcome there)) over the last runs, oldest first; None: not measured in that run."""
        return by_loader(merge_history(self.history)[-_LAST:]) if self.bars else []

    @cached_property
    def flips(self) -> list[Flip]:
        """What changed between runs, the newest first."""
        return flips(self.history)[:_MOST_FLIPS]


def _parts(record: HistoryRecord, most: int) -> tuple[BarPart, ...]:
    parts, foot = [], _HEIGHT
    room = _HEIGHT - sum(bool(count) for count in record.counts.values())
    for outcome in OUTCOMES:
        if count := record.counts.get(outcome, 0):
            height = 1.0 + count / most * room
            foot -= height
            parts.append(BarPart(outcome, count, round(foot, 2), round(height, 2)))
    return tuple(parts)
