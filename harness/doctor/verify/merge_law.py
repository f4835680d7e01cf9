"""Which convention a merge followed: the simplest law that gives the scale found in every module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from harness.verdict.verdict import LawRecord

# 2u of the type the scale may have been rounded in: as the tolerance of the loader checks
_SCALE_ROUNDING = {"float64": 1e-6, "float32": 1e-6, "float16": 2.0**-10}
_COARSE_ROUNDING = 2.0**-7
_LEAST = 1e-4  # a quotient of small integers in single precision, and the sample's own error


@dataclass(frozen=True)
class ScaleFound:
    """The scale found in one module, with what it should have come from; `slack` is its absolute uncertainty."""

    module: str
    scale: float
    slack: float
    strength: float
    alpha: float | None
    rank: int
    rslora: bool = False

    @property
    def expected(self) -> float:
        """strength * alpha / rank (alpha / sqrt(rank) for rsLoRA, 1 without alpha)."""
        return TRAINED.value(self)

    @property
    def right(self) -> bool:
        """True when the scale is the trained one."""
        return TRAINED.fits(self)


@dataclass(frozen=True)
class Candidate:
    """One law a merge may have followed; `factor` is None where the module lacks a number it needs."""

    code: str | None
    name: str
    formula: str
    powers: tuple[float, float, float]
    factor: Callable[[ScaleFound], float | None]
    constant: float = 1.0

    def value(self, found: ScaleFound) -> float:
        """Return the scale this law gives, NaN where it says nothing."""
        factor = self.factor(found)
        return math.nan if factor is None else self.constant * factor

    def fits(self, found: ScaleFound) -> bool:
        """Tell whether this law gives the scale found, within its uncertainty."""
        return abs(found.scale - self.value(found)) <= found.slack


def scale_slack(dtype: str, lora_dtype: str, scale: float) -> float:
    """Return how far rounding the scale itself may move it, for the coarser of the two dtypes."""
    rounding = max(_SCALE_ROUNDING.get(name, _COARSE_ROUNDING) for name in (dtype, lora_dtype))
    return max(rounding, _LEAST) * abs(scale)


def _trained(found: ScaleFound) -> float:
    if found.alpha is None or found.rank == 0:
        return found.strength
    return found.strength * found.alpha / (math.sqrt(found.rank) if found.rslora else found.rank)


def _power(alpha: float, rank: float) -> Callable[[ScaleFound], float | None]:
    """Return strength * alpha^a * rank^r, None where the module lacks an alpha that the power needs."""

    def factor(found: ScaleFound) -> float | None:
        if alpha and (not found.alpha or (found.alpha < 0 and alpha != 1)):
            return None
        if rank and not found.rank:
            return None
        return float(found.strength * (found.alpha or 1.0) ** alpha * float(found.rank) ** rank)

    return factor


def _strength_to(power: int) -> Callable[[ScaleFound], float | None]:
    """Return the trained scale with another power of the strength, None where the strength does not show it."""

    def factor(found: ScaleFound) -> float | None:
        told = found.strength not in (0, 1)
        return _trained(found) / found.strength * found.strength**power if told else None

    return factor


TRAINED = Candidate(None, "as trained", "strength * alpha / rank", (1, 1, -1), _trained)
CANDIDATES = (
    TRAINED,
    Candidate("LH201", "alpha not divided by rank", "strength * alpha", (1, 1, 0), _power(1, 0)),
    Candidate("LH202", "alpha ignored", "strength", (1, 0, 0), _power(0, 0)),
    Candidate("LH203", "alpha / sqrt(rank)", "strength * alpha / sqrt(rank)", (1, 1, -0.5), _power(1, -0.5)),
    Candidate("LH203", "alpha / rank for rsLoRA", "strength * alpha / rank", (1, 1, -1), _power(1, -1)),
    Candidate("LH207", "strength ignored", "alpha / rank", (0, 1, -1), _strength_to(0)),
    Candidate("LH206", "scale doubled or merged twice", "2 * strength * alpha / rank", (1, 1, -1), _trained, 2.0),
    Candidate("LH206", "scale squared", "strength * (alpha / rank)^2", (1, 2, -2), _power(2, -2)),
    Candidate("LH206", "root of the scale", "strength * sqrt(alpha / rank)", (1, 0.5, -0.5), _power(0.5, -0.5)),
    Candidate("LH207", "strength squared", "strength^2 * alpha / rank", (2, 1, -1), _strength_to(2)),
    Candidate("LH208", "divided by the stacked rank", "strength * alpha / (3 * rank)", (1, 1, -1), _trained, 1 / 3),
    Candidate("LH202", "alpha ignored, divided by rank", "strength / rank", (1, 0, -1), _power(0, -1)),
)

NO_LAW = LawRecord(formula="none", name="no single law for all modules")


def name_law(found: Sequence[ScaleFound], *, twice: bool = False) -> tuple[LawRecord, str | None]:
    """Return the law behind the scales of all modules and the code it deserves (None: as trained).

    `twice` says that the rounding itself shows two merges, so the doubled scale is preferred to a convention that
    gives the same number.
    """
    order = sorted(CANDIDATES, key=lambda law: law.constant != 2.0) if twice else CANDIDATES
    fitting = [law for law in order if found and all(law.fits(one) for one in found)]
    if fitting:
        first = fitting[0]
        others = tuple(dict.fromkeys(law.formula for law in fitting[1:] if law.formula != first.formula))
        return _record(first, found, others), first.code
    source = _of_one_module(found)
    if source is not None:
        return source, "LH204"
    return _other(found), "LH209"


def _record(law: Candidate, found: Sequence[ScaleFound], others: tuple[str, ...]) -> LawRecord:
    root = law is TRAINED and any(one.rslora for one in found)
    bare = law is TRAINED and all(one.alpha is None for one in found)
    formula = "strength * alpha / sqrt(rank)" if root else "strength" if bare else law.formula
    strength, alpha, rank = (1.0, 0.0, 0.0) if bare else law.powers
    return LawRecord(
        formula=formula,
        name=law.name,
        exponents={"strength": strength, "alpha": alpha, "rank": -0.5 if root else rank},
        constant=law.constant,
        residual=max(abs(one.scale - law.value(one)) for one in found),
        ambiguous=bool(others),
        alternatives=others,
    )


def _of_one_module(found: Sequence[ScaleFound]) -> LawRecord | None:
    """Return the law in which one module's alpha or rank stands for all, if there is one."""
    known = [one for one in found if one.alpha is not None and one.rank]
    if len({(one.alpha, one.rank) for one in known}) < 2 or any(one.rslora for one in known):
        return None
    for alpha in (None, *dict.fromkeys(one.alpha for one in known)):
        for rank in (None, *dict.fromkeys(one.rank for one in known)):
            if _holds(known, alpha, rank):
                words = f"alpha{'' if alpha is None else f' {alpha:g}'} / rank{'' if rank is None else f' {rank}'}"
                return LawRecord(formula=f"strength * {words}", name="one alpha or rank for all modules")
    return None


def _holds(found: Iterable[ScaleFound], alpha: float | None, rank: int | None) -> bool:
    values = (
        (one, one.strength * (one.alpha if alpha is None else alpha) / (rank or one.rank))  # type: ignore[operator]
        for one in found
    )
    return all(abs(one.scale - value) <= one.slack for one, value in values)


def _other(found: Sequence[ScaleFound]) -> LawRecord:
    ratios = sorted(one.scale / one.expected for one in found if one.expected)
    if ratios and ratios[-1] - ratios[0] <= 0.02 * abs(ratios[-1]):
        constant = ratios[len(ratios) // 2]
        exponents = {"strength": 1.0, "alpha": 1.0, "rank": -1.0}
        formula = f"{constant:.4g} * strength * alpha / rank"
        return LawRecord(formula=formula, name="other factor", exponents=exponents, constant=constant)  # type: ignore[arg-type]
    return NO_LAW
