"""The reference of a run: PEFT's own merge on each bench and variant, held against the float64 closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.benches import Bench, own_benches
from harness.checks.apart import served
from harness.checks.cell import Cell
from harness.checks.family import judge
from harness.checks.known import applies, shipped_known_failures
from harness.checks.plan import Plan, planned
from harness.checks.trial import run_trial
from harness.checks.unloaded import weights_seen
from harness.errors import LoaderSpecError
from harness.isolation.jobs import Channel, Job, run_jobs
from harness.isolation.limits import Limits
from harness.loaders.registry import resolve
from harness.measure.compare import norm
from harness.verdict.codes import CODES
from harness.verdict.verdict import REFERENCE, Verdict

_SECONDS = 30.0
_FEW_LAYERS = Plan(share=0.5)
_BESIDE = "side_effects"  # of a merge, on what is no part of the reference


@dataclass(frozen=True)
class Agreement:
    """How far apart PEFT and the closed form are on one bench and variant.

    `apart` is the largest |W_PEFT - W_exact| / |W_exact| of a layer (Frobenius); `fault` says what of it is more than
    rounding, or that PEFT raised. `refused`: it raised on a bench of the user's own, or merged something else into the
    codes of one, of which nobody said that PEFT takes it.
    """

    bench: str
    variant: str
    apart: float
    fault: str | None = None
    refused: bool = False


@dataclass(frozen=True)
class SelfCheck:
    """What PEFT said wherever it was asked; `without` are the variants it has no form for, `reason` why it was not."""

    version: str | None = None
    places: tuple[Agreement, ...] = ()
    without: tuple[str, ...] = ()
    reason: str = ""

    @property
    def verdicts(self) -> list[Verdict]:
        """A violation per place where PEFT and the closed form disagree."""
        return [self._disagree(place) for place in self.places if place.fault]

    def _disagree(self, place: Agreement) -> Verdict:
        where = f"{place.bench}, {place.variant}"
        title = f"PEFT {self.version} and the closed form disagree on {where}: {place.fault}"
        return Verdict(loader=REFERENCE, check="reference", outcome="failed", title=title)

    def __str__(self) -> str:
        """Return the line of a run: PEFT's version, how closely it agrees, where, and where there is no PEFT."""
        missing = f"; no PEFT reference for {', '.join(self.without)}" if self.without else ""
        if not self.places:
            return f"not run: {self.reason or 'no bench and variant here has one'}{missing}"
        apart = max(place.apart for place in self.places)
        agrees = "disagrees with the closed form" if self.verdicts else f"agrees with the closed form to {apart:.0e}"
        benches, variants = ({getattr(p, kind) for p in self.places} for kind in ("bench", "variant"))
        where = f"{_count(len(benches), 'bench', 'benches')}, {_count(len(variants), 'variant', 'variants')}"
        return f"PEFT {self.version} {agrees.replace('e-0', 'e-')} ({where}){missing}"


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _can_merge(bench: Bench) -> bool:
    """Whether what PEFT merges is there afterwards: it writes to weights, and knows the model's own names alone."""
    return not bench.names and not any(layer.computed for layer in bench.layers.values())


def ask_peft(cells: Sequence[Cell], *, workers: int = 1) -> SelfCheck:
    """Merge a small LoRA with PEFT on every bench and variant of `cells`, in a child process unless `workers` is 0.

    What is held against the closed form is the loader `peft`, whichever loaders the cells are of.
    """
    try:
        subject = resolve("peft")
    except LoaderSpecError as error:
        return SelfCheck(reason=str(error))
    places = [Cell(subject, "peft", *place) for place in dict.fromkeys((c.bench_name, c.variant_name) for c in cells)]
    asked = [c for c in places if c.possible and not subject.unsupported("peft", *_place(c)) and _can_merge(c.bench)]
    wrong = _known_wrong(asked)
    known = [c for c in asked if c not in wrong]
    without = dict.fromkeys(c.variant_name for c in places if c.variant_name not in {a.variant_name for a in asked})
    found = tuple(_asked(known, workers))
    agreed = {place.bench for place in found if not place.refused}
    refused = [place for place in found if place.refused]
    without |= dict.fromkeys(f"{p.bench}/{p.variant}" if p.bench in agreed else p.bench for p in refused)
    without |= dict.fromkeys(f"{c.bench_name}/{c.variant_name}" for c in wrong)
    without |= dict.fromkeys(c.bench_name for c in places if c.bench.names)
    return SelfCheck(subject.version, tuple(place for place in found if not place.refused), tuple(without))


def _place(cell: Cell) -> tuple[str, str]:
    return cell.bench_name, cell.variant_name


def _known_wrong(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells where PEFT is known to load something else, whatever the file: it is no reference there."""
    whole = (line for line in shipped_known_failures() if line.trait is None and not line.kinds)
    lines = [line for line in whole if CODES[line.code].family != _BESIDE]
    return [cell for cell in cells if any(applies(line, cell) for line in lines)]


def _asked(cells: Sequence[Cell], workers: int) -> Iterator[Agreement]:
    """Yield what each cell showed; where its process died, why."""
    found: dict[int, Agreement] = {}

    def job_of(cell: Cell) -> Job:
        def job(channel: Channel) -> None:
            with served(cell, channel, Limits(_SECONDS)) as own:
                channel.send(asdict(compare(own)))

        return job

    def take(index: int, event: dict[str, Any]) -> None:
        found[index] = Agreement(**event)

    ends = run_jobs([job_of(cell) for cell in cells], workers=workers, on_event=take)
    for index, (cell, end) in enumerate(zip(cells, ends, strict=True)):
        why = f"its process ended: {end.detail or end.status}"
        yield found.get(index) or Agreement(cell.bench_name, cell.variant_name, math.inf, why)


def compare(cell: Cell) -> Agreement:
    """Merge the first planned LoRA of a cell, with several ranks and alphas, on a few layers, and judge it."""
    seen = run_trial(cell, next(planned(cell, _FEW_LAYERS.layers_in(cell))))
    if seen.raised and cell.bench_name in own_benches():
        return Agreement(*_place(cell), math.inf, seen.raised.what, refused=True)
    faults = [finding.fact for finding in judge(seen) if finding.family != _BESIDE]  # of PEFT, not of its merge
    if faults and any(layer.codes for layer in cell.bench.layers.values()):  # codes of which it may know nothing
        return Agreement(*_place(cell), math.inf, faults[0], refused=True)
    base = weights_seen(cell.view, cell.bench, seen.example.dtype, cell.variant.bias)
    apart = (
        math.hypot(fit.residual, (fit.scale - fit.expected) * fit.product) / norm(base[name] + seen.changes[name])
        for name, (fit, *_) in seen.fits.items()
    )
    return Agreement(cell.bench_name, cell.variant_name, max(apart, default=math.inf), next(iter(faults), None))
