"""A scaling law as data: what a loader makes of strength, alpha and rank, and the strength that undoes it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.law.grammar import ALPHA, RANK, SOURCES, STRENGTH, Word
from harness.law.probe import Probe
from harness.verdict.blocks import block_of

CONSTANT_COST = 1
SOURCE_COST = 1
_SOURCES = ("own", *SOURCES)
_NUMBER = re.compile(r"-?[0-9.]+(e[+-]?[0-9]+)?")
_SAME = 1e-4  # alphas in half precision and ratios such as 10 / 3 agree far better, other laws far worse


@dataclass(frozen=True)
class Law:
    """s = constant * strength word * alpha word * rank word, alpha and rank taken from `*_source` modules.

    `root`: the files were trained with alpha / sqrt(rank) and say so. `others` are laws that explain the probes as
    well. `factors`: (block, constant) pairs in place of the constant, where each block of the model has one of its own.
    """

    strength: Word
    alpha: Word
    rank: Word
    alpha_source: str = "own"
    rank_source: str = "own"
    constant: float = 1.0
    residual: float = 0.0
    others: tuple[Law, ...] = ()
    root: bool = False
    factors: tuple[tuple[str, float], ...] = ()

    @property
    def cost(self) -> int:
        """How far this law is from the trained one; 0 is PEFT's."""
        sources = (self.alpha_source != "own") + (self.rank_source != "own")
        words = self.strength.cost + self.alpha.cost + self.rank.cost
        return words + SOURCE_COST * sources + CONSTANT_COST * (self.constant != 1.0 or bool(self.factors))

    @property
    def ambiguous(self) -> bool:
        """True when another law explains the probes as well."""
        return bool(self.others)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The formulas of `others`, each once."""
        return tuple(dict.fromkeys(law.formula for law in self.others if law.formula != self.formula))

    @property
    def formula(self) -> str:
        """The law as text, for example `strength * alpha / rank` or `0.5 * strength`."""
        constant = "c(block)" if self.factors else "" if self.constant == 1.0 else f"{self.constant:.4g}"
        strength = self.strength.text.format(x="strength")
        alpha = self.alpha.text.format(x=_of("alpha", self.alpha_source))
        rank = self.rank.text.format(x=_of("rank", self.rank_source))
        factors = " * ".join(part for part in (constant, strength, alpha) if part not in ("", "1")) or "1"
        return factors if rank == "1" else f"{factors} {rank}"

    @property
    def is_trained(self) -> bool:
        """True for strength * alpha / rank, or sqrt(rank) (strength alone without alpha): what training used."""
        return (self.cost, self.rank.exponent) == (1, -0.5) if self.root else self.cost == 0

    @property
    def exponents(self) -> dict[str, float | None]:
        """Exponents of strength, alpha and rank; None where the dependence is no power."""
        return {"strength": self.strength.exponent, "alpha": self.alpha.exponent, "rank": self.rank.exponent}

    def scale(self, probe: Probe) -> float:
        """Return the scale this law gives for one probe."""
        alphas = [alpha for alpha in probe.alphas if alpha is not None] or [0.0]
        alpha = probe.alpha or 0.0 if self.alpha_source == "own" else SOURCES[self.alpha_source](alphas)
        ranks = [float(rank) for rank in probe.ranks]
        rank = ranks[probe.index] if self.rank_source == "own" else SOURCES[self.rank_source](ranks)
        constant = dict(self.factors).get(block_of(probe.module), self.constant)
        return constant * self.strength.apply(probe.strength) * self.alpha.apply(alpha) * self.rank.apply(rank)

    def predict(self, probes: Sequence[Probe]) -> list[float]:
        """Return the scale this law gives for each probe."""
        return [self.scale(probe) for probe in probes]

    def prescription(self, scales: Sequence[tuple[float, int]]) -> float | None:
        """Return the strength that reproduces training for modules given as (alpha, rank), or None.

        None: the modules need different strengths, or no strength reaches the trained scale.
        """
        alphas, ranks = tuple(alpha for alpha, _ in scales), tuple(rank for _, rank in scales)
        unit = [Probe("", 1.0, i, alphas, ranks, 0.0, 0.0, root=self.root) for i in range(len(scales))]
        return self.strength_for(self.predict(unit), [probe.expected for probe in unit]) if unit else None

    def strength_for(self, gains: Sequence[float], wanted: Sequence[float]) -> float | None:
        """Return the strength, to six digits, that turns the scales at strength 1, `gains`, into those of `wanted`.

        None: no single one does. 1.0 when every strength does.
        """
        one = self.strength.apply(1.0)
        needed = []
        for gain, scale in zip(gains, wanted, strict=True):
            if not math.isfinite(gain) or ((gain == 0 or self.strength.exponent == 0) and gain != scale):
                return None
            if gain and self.strength.exponent != 0:
                needed.append(scale / gain * one)
        if not needed:
            return 1.0
        alike = all(math.isclose(needed[0], each, rel_tol=_SAME, abs_tol=1e-12) for each in needed)
        found = _inverted(self.strength, needed[0]) if alike else None
        return None if found is None else float(f"{found:.6g}")


TRAINED = Law(STRENGTH[0], ALPHA[0], RANK[0])


def law_of_formula(text: str) -> Law | None:
    """Return the law whose `formula` is `text`; None where it is none, or has a constant for every block."""
    ranks = {f" {word.text.format(x=_of('rank', each))}": (word, each) for word in RANK for each in _SOURCES}
    end = max((each for each in ranks if each != " 1" and text.endswith(each)), key=len, default="")
    rank, rank_source = ranks[end or " 1"]
    alphas = {word.text.format(x=_of("alpha", each)): (word, each) for word in ALPHA for each in _SOURCES}
    strengths = {word.text.format(x="strength"): word for word in STRENGTH}
    parts = text.removesuffix(end).split(" * ")
    strength = next((strengths[part] for part in parts if part in strengths and part != "1"), STRENGTH[1])
    alpha, source = next((alphas[part] for part in parts if part in alphas and part != "1"), (ALPHA[1], "own"))
    constants = [float(part) for part in parts if _NUMBER.fullmatch(part)]
    found = Law(strength, alpha, rank, source, rank_source, math.prod(constants))
    return found if found.formula == text else None


def _of(word: str, source: str) -> str:
    return word if source == "own" else f"{word}({source})"


def _inverted(word: Word, value: float) -> float | None:
    """Return the strength u with word(u) = value, found on a grid of candidates, or None."""
    power = 1 / word.exponent if word.exponent else 1.0
    size, root = abs(value) ** power, abs(value) ** 0.5
    candidates = (value, size, -size, root, value * abs(value), value - 1.0, -root)
    return next((u for u in candidates if math.isclose(word.apply(u), value, rel_tol=1e-9)), None)
