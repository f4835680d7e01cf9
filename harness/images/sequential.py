"""A sweep in turns: one denoiser call first, then only as many pictures as make the answer sure.

The probe, one call of the denoiser per prompt and seed at every strength, says what the pictures should say. These are
drawn at the strengths that decide, with few prompts and seeds, then with twice as many, until both say the same and the
interval of the factor leaves out 1 or lies within 5 % of it. Where they do not agree every strength is drawn with all
of them. Both are wrong in the same way no more often than either is: benchmarks/image_power.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.images.recorder import Recorder, SweepResult
from harness.images.report import crashed_verdict, sweep_verdict
from harness.images.studio import Studio
from harness.images.verdict import TRUSTED, Judgement, StrengthResult, judge
from harness.isolation.calls import CallFailedError
from harness.isolation.subject import Asked
from harness.loaders.protocol import Subject

FIRST = 4  # pictures: of one, one in twelve of a model in int4 looks wrong
ENOUGH = 0.05
_SAME_FACTOR = 1.1
_FOLLOWS = (0.2, TRUSTED)  # strengths that pictures follow closely


def counts(pictures: int) -> tuple[int, ...]:
    """Return how many pictures are looked at in turn: 4, 8, 16, ... and all of them."""
    doubled = (FIRST * 2**turn for turn in range(pictures.bit_length()))
    return (*(count for count in doubled if count < pictures), pictures)


def studios_of(whole: Studio) -> list[Studio]:
    """Return the studio of the probe, then one for each of `counts`, the last with all pictures of `whole`."""
    pairs, batch = whole.sampler.pairs, whole.sampler.batch
    probe = Studio(whole.opened, whole.lora, pairs, quick=True, batch=batch)
    few = (Studio(whole.opened, whole.lora, pairs[:n], batch=batch, number=i) for i, n in _numbered(len(pairs)))
    return [probe, *few]


def _numbered(pictures: int) -> Iterator[tuple[int, int]]:
    yield from enumerate(counts(pictures), 1)


def agree(probe: Judgement, seen: Judgement) -> bool:
    """Whether pictures say for sure what one denoiser call says: as trained, or the same factor off."""
    if probe.finding == "as trained":
        low, high = seen.interval or (0.0, 0.0)
        return seen.finding == "as trained" and low > 1 - ENOUGH and high < 1 + ENOUGH
    if not probe.code or not seen.code or bool(probe.reason) != bool(seen.reason):
        return False
    if probe.finding == seen.finding and probe.finding in ("no visible effect", "broken"):
        return True
    ratio = (seen.factor or 0.0) / (probe.factor or math.inf)
    return 1 / _SAME_FACTOR < ratio < _SAME_FACTOR


def deciding(probe: Judgement, observations: Sequence[StrengthResult]) -> list[float]:
    """Return the strengths at which pictures are drawn first: 0, the one nearest to 1, and where a fault shows best."""
    strengths = [o.strength for o in observations]
    chosen = _always(strengths)
    if probe.code and probe.told_by:
        chosen.add(probe.told_by.strength)
        if not _FOLLOWS[0] <= _looks_like(probe.told_by) <= _FOLLOWS[1]:
            chosen.add(min(observations, key=_from_one).strength)
    return [strength for strength in strengths if strength in chosen]


def _always(strengths: Sequence[float]) -> set[float]:
    """Return 0, where it is asked for, and the strength nearest to 1."""
    return {0.0} & set(strengths) | {min(filter(None, strengths), key=lambda s: (abs(s - 1), s), default=0.0)}


def _looks_like(o: StrengthResult) -> float:
    return abs(o.estimate.strength) if o.estimate and o.strength else 0.0


def _from_one(o: StrengthResult) -> float:
    """Return how far from the trained strength it looks, as a factor: there a ladder is read best."""
    looks = _looks_like(o)
    return abs(math.log(looks)) if looks else math.inf


class InTurn:
    """Sweeps one subject in turns; `studios` are those of `studios_of`."""

    def __init__(
        self,
        studios: Sequence[Studio],
        subject: Subject,
        out: Path | None,
        on_record: Callable[[dict[str, Any]], object],
        asked: Asked,
    ) -> None:
        self._probe = Recorder(studios[0], subject, None, lambda row: None, asked)
        self._looks, self._subject, self._out, self._asked = studios[1:], subject, out, asked
        self._on_record = on_record
        self._last = self._probe

    def run(self, alphas: Sequence[float], started: float) -> SweepResult:
        """Probe all strengths, draw what decides, and judge; after a crash of the subject what was drawn is kept.

        `started` is when the sweep began, by `time.perf_counter`.
        """
        found = SweepResult()
        try:
            found.judgement = self._judged(alphas)
        except CallFailedError as failed:
            found.verdicts.append(crashed_verdict(self._subject, self._last.studio, failed.raised))
        probed = self._rest()
        found.observations = [*self._last.result.observations] if self._last is not self._probe else []
        if found.judgement is not None:
            seconds = round(time.perf_counter() - started, 3)
            place = self._subject, self._last.studio, found.observations, found.judgement, seconds
            found.verdicts.append(sweep_verdict(*place, probed=[o for o, _ in probed]))
        found.records = self._told(alphas, [row for _, row in probed])
        return found

    def _judged(self, alphas: Sequence[float]) -> Judgement:
        self._probe.draw_all(alphas, keep=_always(alphas))
        seen = self._probe.result.observations
        said, near = judge(seen), {o.strength: o.estimate.strength for o in seen if o.estimate}
        sure = said.code is not None or said.finding == "as trained"
        for studio in self._looks if sure else ():
            self._last = Recorder(studio, self._subject, self._out, lambda row: None, self._asked, near)
            self._last.draw(deciding(said, seen))
            shown = judge(self._last.result.observations)
            if agree(said, shown):
                return shown
        self._last = Recorder(self._looks[-1], self._subject, self._out, lambda row: None, self._asked)
        self._last.draw_all(alphas)  # as a sweep that is not in turns does
        return judge(self._last.result.observations)

    def _rest(self) -> list[tuple[StrengthResult, dict[str, Any]]]:
        """Return what the probe showed at the strengths that were not drawn."""
        drawn = {o.strength for o in self._last.result.observations} if self._last is not self._probe else set()
        shown = zip(self._probe.result.observations, self._probe.result.records, strict=True)
        return [pair for pair in shown if pair[0].strength not in drawn]

    def _told(self, alphas: Sequence[float], probed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Hand on the rows, one per strength, in the order in which strengths were asked for."""
        drawn = self._last.result.records if self._last is not self._probe else []
        order = {strength: place for place, strength in enumerate(alphas)}
        rows = sorted([*drawn, *probed], key=lambda row: order.get(row["strength"], len(order)))
        for row in rows:
            self._on_record(row)
        return rows
