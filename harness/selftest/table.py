"""The power of the checks as a Markdown table: found and named per family of faults, false alarms on right loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from harness.report.models import PowerRecord

_HEAD = "| loaders | number | found | named right | examples until found (median) | false alarms |"


def power_markdown(records: Sequence[PowerRecord]) -> str:
    """Return one row per family of broken loaders, one for all of them, and one for the right loaders.

    The median is over the loaders that random examples show; the others are found by loading twice, unloading and the
    like. Records of the checks of pictures are left out.
    """
    weights = [record for record in records if record.source == "weights" and record.images is None]
    broken = [record for record in weights if record.fault]
    right = [record for record in weights if not record.fault]
    rows = [_broken_row(family, [r for r in broken if _family(r) == family]) for family in _families(broken)]
    rows += [_broken_row("**all that are wrong**", broken)] if broken else []
    rows += [_right_row(right)] if right else []
    return "\n".join([_HEAD, "| --- | --- | --- | --- | --- | --- |", *rows]) + "\n"


def _broken_row(family: str, records: Sequence[PowerRecord]) -> str:
    found, named = sum(r.detected for r in records), sum(r.named or 0 for r in records)
    seen = [r.examples for r in records if r.examples is not None]
    return f"| {family} | {len(records)} | {found} | {named} | {f'{median(seen):g}' if seen else '–'} | |"


def _right_row(records: Sequence[PowerRecord]) -> str:
    alarms, examples = sum(r.detected for r in records), sum(r.trials for r in records)
    return f"| **all that are right** | {len(records)} | | | | {alarms} in {examples} examples |"


def _family(record: PowerRecord) -> str:
    return record.subject.partition(":")[0]


def _families(records: Iterable[PowerRecord]) -> Iterator[str]:
    yield from dict.fromkeys(map(_family, records))
