"""Turning the strength knob on one LoRA file: how many times the trained effect it gives, and what to expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from harness.checks.apart import done_apart
from harness.checks.cell import Cell
from harness.checks.trial import run_trial
from harness.example import Example, Target
from harness.law.scale import word_of
from harness.verdict.verdict import Verdict


@dataclass(frozen=True)
class StrengthRow:
    """At `strength` the loader gives `factor` times the trained effect."""

    strength: float
    factor: float
    word: str


def strength_table(cell: Cell, *, rank: int, alpha: float, strengths: Sequence[float]) -> list[StrengthRow]:
    """Load a LoRA of `rank` and `alpha` on every target at each strength and return what it amounts to.

    The factor is the median over the modules of measured scale / (alpha / rank).

    Raises:
        RuntimeError: the loader raised.
    """
    factors, end = done_apart(cell, lambda own: [_factor(own, rank, alpha, strength) for strength in strengths])
    if factors is None:
        raise RuntimeError(end.what)
    return [StrengthRow(s, factor, word_of(factor)) for s, factor in zip(strengths, factors, strict=True)]


def _factor(cell: Cell, rank: int, alpha: float, strength: float) -> float:
    targets = tuple(Target(name, rank, alpha) for name in cell.targets)
    observation = run_trial(cell, Example(targets, strength=strength, dtype=cell.dtypes[0]))
    if observation.raised:
        raise RuntimeError(observation.raised.what)
    return median(fits[0].scale for fits in observation.fits.values()) / (alpha / rank)


def table_verdicts(cell: Cell, rank: int, alpha: float, rows: Sequence[StrengthRow]) -> list[Verdict]:
    """Turn the rows into verdicts of a check called `strength_table`; they state facts, so all of them pass."""
    argument = cell.subject.strength_argument
    return [
        cell.verdict(
            "strength_table",
            "passed",
            title=f"rank {rank}, alpha {alpha:g}, {argument} = {row.strength:g}: {row.factor:.3g}x, {row.word}",
            measured_scale=row.factor * alpha / rank,
            expected_scale=alpha / rank,
            ratio=row.factor,
            data={"rank": rank, "alpha": alpha, "strength": row.strength, "word": row.word},
        )
        for row in rows
    ]
