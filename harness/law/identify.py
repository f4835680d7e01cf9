"""Which scaling law a loader really has: the simplest law of the grammar that explains every probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from harness.law.grammar import ALPHA, NO_ALPHA, RANK, RANK_ALONE, SOURCES, STRENGTH, Word, word_of
from harness.law.law import CONSTANT_COST, SOURCE_COST, TRAINED, Law
from harness.law.probe import Probe

Vector = NDArray[np.float64]
_MAX_COST = 5
_SLACK = 1.5  # a probe at the edge of its tolerance must not hide the law of all the others
_FEW = 48  # probes that most laws are refuted on
_SNAP_TO = np.unique([n / d for d in (1, 2, 3, 4, 6, 8) for n in range(1, 13)])

# of the strength, and of an alpha and a rank with their sources
Words = tuple[Word, tuple[Word, str], tuple[Word, str]]


_ROOT = Law(STRENGTH[0], ALPHA[0], RANK[2])
# The conventions met in practice: probes that cannot tell these apart (rank = alpha, say) leave the law ambiguous.
_CONFUSED = tuple(Law(STRENGTH[0], alpha, rank) for alpha in ALPHA[:2] for rank in RANK[:3])[1:]
# What else a wrong scale may be read as, when its probes have one ratio of alpha to rank, or one strength.
_READINGS = (
    Law(STRENGTH[0], word_of(ALPHA, 2.0), word_of(RANK, -2.0)),
    Law(STRENGTH[0], word_of(ALPHA, 0.5), word_of(RANK, -0.5)),
    *(Law(word_of(STRENGTH, power), ALPHA[0], RANK[0]) for power in (0.0, 2.0)),
    Law(next(word for word in STRENGTH if word.text == "(1 + {x})"), ALPHA[0], RANK[0]),
)


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
    laws = sorted(_candidates(columns), key=lambda law: (law.cost, _has_free_factor(law), law.residual))
    if not laws:
        return None
    first = replace(laws[0], root=all(p.root for p in usable))
    ties = [law for law in laws[1:] if law.cost == first.cost]
    ties += _readings(columns, first) if columns.alpha_seen else []
    others = {law.formula: replace(law, root=first.root) for law in ties if law.formula != first.formula}
    return replace(first, others=tuple(others.values()))


def _has_free_factor(law: Law) -> bool:
    """Tell whether a factor that nothing explains stands before another law than the trained one."""
    return law.constant != 1.0 and law.cost > CONSTANT_COST


def _readings(columns: _Columns, first: Law) -> Iterator[Law]:
    """Yield the conventions that explain the probes too, and for a wrong scale whatever else may stand behind it."""
    yield from filter(columns.explains, _CONFUSED)
    if not first.is_trained:
        yield from filter(columns.explains, _READINGS)
        if scaled := columns.fit(_ROOT if first.root else TRAINED):
            yield scaled


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
    return np.array([word.cost + SOURCE_COST * (source != "own") for word, source in pairs])


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
        alphas = {p.alphas: _present(p.alphas) for p in probes}
        ranks = {p.ranks: [float(rank) for rank in p.ranks] for p in probes}
        for name, pick in SOURCES.items():
            of_file = {key: pick(values) for key, values in (*alphas.items(), *ranks.items())}
            self.alpha[name] = np.array([of_file[p.alphas] for p in probes], dtype=np.float64)
            self.rank[name] = np.array([of_file[p.ranks] for p in probes], dtype=np.float64)
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
            distinct, places = np.unique(values, return_inverse=True)
            self._cache[key] = np.array([word.apply(float(x)) for x in distinct], dtype=np.float64)[places]
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
