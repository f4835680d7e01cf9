"""Which scaling law a loader really has: the simplest law of the grammar that explains every probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.law.grammar import ALPHA, NO_ALPHA, RANK, RANK_ALONE, SOURCES, STRENGTH, Vector, Word
from harness.law.probe import Probe

_CONSTANT_COST = 1
_SOURCE_COST = 1
_MAX_COST = 5
_SLACK = 1.5  # a probe at the edge of its tolerance must not hide the law of all the others
_FEW = 48  # probes that most laws are refuted on
_SNAP_TO = np.unique([n / d for d in (1, 2, 3, 4, 6, 8) for n in range(1, 13)])

# of the strength, and of an alpha and a rank with their sources
Words = tuple[Word, tuple[Word, str], tuple[Word, str]]


@dataclass(frozen=True)
class Law:
    """s = constant * strength word * alpha word * rank word, alpha and rank taken from `*_source` modules.

    `root`: the files were trained with alpha / sqrt(rank) and say so.
    """

    strength: Word
    alpha: Word
    rank: Word
    alpha_source: str = "own"
    rank_source: str = "own"
    constant: float = 1.0
    residual: float = 0.0
    alternatives: tuple[str, ...] = ()
    root: bool = False

    @property
    def cost(self) -> int:
        """How far this law is from the trained one; 0 is PEFT's."""
        sources = (self.alpha_source != "own") + (self.rank_source != "own")
        words = self.strength.cost + self.alpha.cost + self.rank.cost
        return words + _SOURCE_COST * sources + _CONSTANT_COST * (self.constant != 1.0)

    @property
    def ambiguous(self) -> bool:
        """True when another law explains the probes as well."""
        return bool(self.alternatives)

    @property
    def formula(self) -> str:
        """The law as text, for example `strength * alpha / rank` or `0.5 * strength`."""
        constant = "" if self.constant == 1.0 else f"{self.constant:.4g}"
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

    def predict(self, probes: Sequence[Probe]) -> Vector:
        """Return the scale this law gives for each probe."""
        return np.asarray(self.constant * _Columns(probes).evaluate(self), dtype=np.float64)

    def prescription(self, scales: Sequence[tuple[float, int]]) -> float | None:
        """Return the strength that reproduces training for modules given as (alpha, rank), or None.

        None: the modules need different strengths, or no strength reaches the trained scale.
        """
        alphas, ranks = tuple(alpha for alpha, _ in scales), tuple(rank for _, rank in scales)
        unit = [Probe("", 1.0, i, alphas, ranks, 0.0, 0.0, root=self.root) for i in range(len(scales))]
        gains = self.predict(unit)
        wanted = np.array([probe.expected for probe in unit])
        if not len(gains) or np.any(gains == 0) or not np.all(np.isfinite(gains)):
            return None
        needed = wanted / gains * self.strength.apply(np.ones(1))
        return _invert(self.strength, float(needed[0])) if np.allclose(needed, needed[0], rtol=1e-6) else None


# The conventions met in practice: probes that cannot tell these apart (rank = alpha, say) leave the law ambiguous.
_CONFUSED = tuple(Law(STRENGTH[0], alpha, rank) for alpha in ALPHA[:2] for rank in RANK[:3])


def identify(probes: Sequence[Probe]) -> Law | None:
    """Return the simplest law that explains all `probes` within their tolerances, or None when none does.

    Probes of modules without alpha tell nothing of the alpha law; they are used only when no module carries one. In a
    file where only some modules have alpha, readers disagree on what stands for the others: such files come last too.
    """
    whole = [p for p in probes if None not in p.alphas]
    usable = whole or [p for p in probes if p.alpha is not None] or list(probes)
    if not usable:
        return None
    columns = _Columns(usable)
    laws = sorted(_candidates(columns), key=lambda law: (law.cost, law.residual))
    if not laws:
        return None
    ties = [law for law in laws[1:] if law.cost == laws[0].cost]
    ties += [
        law for law in _CONFUSED if law.alpha.cost + law.rank.cost and columns.alpha_seen and columns.explains(law)
    ]
    others = dict.fromkeys(law.formula for law in ties if law.formula != laws[0].formula)
    return replace(laws[0], alternatives=tuple(others), root=all(p.root for p in usable))


def _candidates(columns: _Columns) -> list[Law]:
    """Return the laws of the grammar that explain the probes, up to the cost of the cheapest one."""
    found: list[Law] = []
    for cost in range(_MAX_COST + 1):
        for strength, (alpha, alpha_source), (rank, rank_source) in columns.possible(cost):
            fitted = columns.fit(Law(strength, alpha, rank, alpha_source, rank_source))
            if fitted is not None:
                found.append(fitted)
        if found and min(law.cost for law in found) <= cost:
            break
    return found


def _costs(pairs: Sequence[tuple[Word, str]]) -> NDArray[np.int_]:
    return np.array([word.cost + _SOURCE_COST * (source != "own") for word, source in pairs])


class _Columns:
    """The probes as columns of numbers, with each word's values computed once."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.alpha_seen = any(p.alpha is not None for p in probes)
        self.alpha_elsewhere = any(alpha is not None for p in probes for alpha in p.alphas)
        self.strength = np.array([p.strength for p in probes], dtype=np.float64)
        self.measured = np.array([p.measured for p in probes], dtype=np.float64)
        self.tolerance = np.array([p.tolerance for p in probes], dtype=np.float64)
        self.alpha = {"own": np.array([p.alpha or 0.0 for p in probes], dtype=np.float64)}
        self.rank = {"own": np.array([p.rank for p in probes], dtype=np.float64)}
        for name, pick in SOURCES:
            self.alpha[name] = np.array([pick(_present(p.alphas)) for p in probes], dtype=np.float64)
            self.rank[name] = np.array([pick([float(r) for r in p.ranks]) for p in probes], dtype=np.float64)
        self._cache: dict[tuple[str, str, str], Vector] = {}

    def alpha_words(self) -> list[tuple[Word, str]]:
        """Pair every alpha word with every source; modules without alpha can only be given that of others."""
        if self.alpha_seen:
            return _pairs(ALPHA, self.alpha)
        foreign = _pairs(ALPHA, self.alpha) if self.alpha_elsewhere else []
        return [(NO_ALPHA, "own"), *(pair for pair in foreign if pair[1] != "own")]

    def rank_words(self) -> list[tuple[Word, str]]:
        """Pair every rank word with every source; a file without alpha is trained at scale 1, not 1 / rank."""
        return _pairs(RANK if self.alpha_seen else RANK_ALONE, self.rank)

    def possible(self, cost: int) -> Iterator[Words]:
        """Yield the words of this cost that a few probes leave possible with some constant.

        A constant that keeps within the slack of n probes leaves squared errors, in tolerances, of at most n slack^2 in
        sum; least squares never leaves more.
        """
        strengths, alphas, ranks = [(word, "own") for word in STRENGTH], self.alpha_words(), self.rank_words()
        costs = _costs(strengths)[:, None, None] + _costs(alphas)[:, None] + _costs(ranks)
        which = np.argwhere(costs == cost)
        if not len(which):
            return
        few = np.linspace(0, len(self.measured) - 1, min(_FEW, len(self.measured))).astype(int)
        columns = zip(("strength", "alpha", "rank"), (strengths, alphas, ranks), which.T, strict=True)
        values = [
            np.stack([self._values(name, *each)[few] for each in words])[chosen] for name, words, chosen in columns
        ]
        tolerance = self.tolerance[few]
        left = _unexplained(values[0] * values[1] * values[2] / tolerance, self.measured[few] / tolerance)
        for i, j, k in which[left <= len(few) * _SLACK**2]:
            yield STRENGTH[i], alphas[j], ranks[k]

    def evaluate(self, law: Law) -> Vector:
        """Return the law's value for each probe, with constant 1."""
        product = self._values("strength", law.strength, "own") * self._values("alpha", law.alpha, law.alpha_source)
        return np.asarray(product * self._values("rank", law.rank, law.rank_source))

    def fit(self, law: Law) -> Law | None:
        """Return `law` with the constant that explains the probes, or None when no constant does."""
        base = self.evaluate(law)
        if not np.all(np.isfinite(base)) or not np.any(base):
            return None
        for constant in (1.0, *self._constants(base)):
            errors = np.abs(self.measured - constant * base)
            if np.all(errors <= _SLACK * self.tolerance):
                return replace(law, constant=constant, residual=float(errors.max()))
        return None

    def explains(self, law: Law) -> bool:
        """Whether `law` with its own constant agrees with every probe."""
        return bool(np.all(np.abs(self.measured - law.constant * self.evaluate(law)) <= _SLACK * self.tolerance))

    def _constants(self, base: Vector) -> list[float]:
        weighted = base / self.tolerance**2  # a half-precision probe must not blur what single precision tells
        fitted = float(weighted @ self.measured) / float(weighted @ base)
        if fitted == 0:
            return []
        snapped = _SNAP_TO[np.abs(_SNAP_TO - abs(fitted)).argmin()]
        return [float(snapped * np.sign(fitted)), fitted]

    def _values(self, column: str, word: Word, source: str) -> Vector:
        key = (column, word.text, source)
        if key not in self._cache:
            values = self.strength if column == "strength" else getattr(self, column)[source]
            self._cache[key] = np.asarray(word.apply(values), dtype=np.float64)
        return self._cache[key]


def _unexplained(laws: Vector, wanted: Vector) -> Vector:
    """Return the sum of squares that the best constant times each of `laws [n, probes]` leaves of `wanted [probes]`.

    A little less, for the rounding of the sums; NaN where a law is infinite.
    """
    with np.errstate(all="ignore"):
        energy = np.square(laws).sum(axis=1)
        explained = np.where(energy > 0, np.square(laws @ wanted) / energy, 0.0)
    return np.asarray(wanted @ wanted * (1 - 1e-12) - explained)


def _pairs(words: Sequence[Word], columns: dict[str, Vector]) -> list[tuple[Word, str]]:
    """Pair words with sources; a word that ignores its number has no source."""
    return [(w, source) for w in words for source in columns if source == "own" or w.text != "1"]


def _present(alphas: Sequence[float | None]) -> list[float]:
    return [alpha for alpha in alphas if alpha is not None] or [0.0]


def _of(word: str, source: str) -> str:
    return word if source == "own" else f"{word}({source})"


def _invert(word: Word, value: float) -> float | None:
    """Return the strength u with word(u) = value, found on a grid of candidates, or None."""
    root = abs(value) ** 0.5
    candidates = np.array([value, root, value * abs(value), value - 1.0, -root])
    reached = word.apply(candidates)
    hits = candidates[np.isclose(reached, value, rtol=1e-9)]
    return float(hits[0]) if len(hits) and word.text != "1" else None
