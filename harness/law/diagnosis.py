"""From probes to a diagnosis: the law that a loader follows, the code that names it, or the trait that decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from harness.law.law import Law, identify
from harness.law.probe import Probe
from harness.law.traits import TRAITS, borrowed, common_trait, one_input_decides
from harness.verdict.codes import CODES
from harness.verdict.verdict import LawRecord


@dataclass(frozen=True)
class Diagnosis:
    """The law of all probes when one explains them; else the law of those that are wrong and the trait they share."""

    law: Law | None
    code: str | None
    trait: str | None = None

    @property
    def family(self) -> str:
        """`strength` when only the strength is mishandled, else `scale`."""
        return "strength" if self.code == "LH207" else "scale"


def diagnose(probes: Sequence[Probe], *, unloaded: Iterable[str] = ()) -> Diagnosis:
    """Name the law of `probes`; `unloaded` are modules that coverage reports, so no law has to explain them."""
    skip = set(unloaded)
    usable = [p for p in probes if p.module not in skip]
    heard = any(abs(p.measured) > 4 * p.tolerance for p in usable)  # zeros alone fit many laws
    law = identify([p for p in usable if not p.permuted]) if heard else None
    if law is not None and not (law.is_trained and any(not p.right for p in usable)):
        return Diagnosis(law, None if law.is_trained else code_of(law))
    wrong = [p for p in usable if not p.right]
    if not wrong:
        return Diagnosis(law, None)
    return _by_part(usable, wrong)


def _by_part(usable: Sequence[Probe], wrong: Sequence[Probe]) -> Diagnosis:
    """No one law explains everything: look for the part of the probes that is wrong and for that part's own law."""
    in_order = [p for p in usable if not p.permuted]
    if any(not p.right for p in in_order):  # in a file with permuted keys nobody can say which module is first
        usable, wrong = in_order, [p for p in in_order if not p.right]
    silent = all(abs(p.measured) <= 4 * p.tolerance for p in wrong)
    for trait, part in () if silent else _parts(usable, wrong):
        law = identify(part)
        if law is not None and not law.is_trained:
            return Diagnosis(law, _code_under(trait, code_of(law, fused_only=all(p.fused for p in part))), trait)
    telling = [p for p in usable if p.right and abs(p.expected) > 4 * p.tolerance]
    exact = common_trait(wrong, telling)
    if exact and "strength" in exact:
        return Diagnosis(None, "LH207", exact)
    clamped = _clamped(wrong)
    if clamped:
        return Diagnosis(None, *clamped)
    law = identify(wrong) if len(wrong) >= _ENOUGH and not (silent or exact) else None
    if law is not None and not law.is_trained:
        return Diagnosis(law, code_of(law), "some modules of some files")
    return Diagnosis(None, "LH205", exact) if exact in _ALPHA_VALUES else _by_input(wrong, telling, exact)


def _by_input(wrong: Sequence[Probe], telling: Sequence[Probe], trait: str | None) -> Diagnosis:
    """Name what follows no law by the input that it depends on, or else by the trait."""
    if other := borrowed(wrong):
        return Diagnosis(None, "LH204", other)
    for name, code in () if trait else (("alpha", "LH205"), ("strength", "LH207")):
        if certain := one_input_decides(name, wrong, telling):
            return Diagnosis(None, code, certain)
    return Diagnosis(None, "LH209", trait)


_ENOUGH = 12  # wrong probes that follow one law by chance are fewer

# Traits of alpha's value: a loader that is wrong for these values only does not take alpha as it is.
_ALPHA_VALUES = ("negative alpha", "alpha = 0", "fractional alpha", "0 < alpha < 1", "alpha > rank", "alpha < rank")


def _code_under(trait: str, code: str) -> str:
    if "strength" in trait:
        return "LH207"
    return "LH205" if code == "LH202" and trait in _ALPHA_VALUES else code


def _clamped(wrong: Sequence[Probe]) -> tuple[str, str] | None:
    """Return code and trait when the wrong probes all behave as if alpha, or the strength, were one same number."""
    seen = [p for p in wrong if p.alpha and p.strength]
    if len(seen) < len(wrong):
        return None
    alphas, strengths = [p.alpha or 0.0 for p in seen], [p.strength for p in seen]
    for code, word, values, others in (("LH205", "alpha", alphas, strengths), ("LH207", "strength", strengths, alphas)):
        units = [other / p.rank for other, p in zip(others, seen, strict=True)]
        bound = median(p.measured / unit for p, unit in zip(seen, units, strict=True))
        near = (abs(p.measured - bound * unit) <= 1.5 * p.tolerance for p, unit in zip(seen, units, strict=True))
        one_side = max(values) <= bound or min(values) >= bound
        if len(set(values)) > 2 and one_side and all(near):
            return code, f"{word} beyond {bound:.4g}"
    return None


def _parts(usable: Sequence[Probe], wrong: Sequence[Probe]) -> Iterator[tuple[str, Sequence[Probe]]]:
    """Yield the parts of the probes that hold every wrong one: by trait, then by module."""
    for name, holds in TRAITS.items():
        part = [p for p in usable if holds(p)]
        if len(part) < len(usable) and all(map(holds, wrong)):
            yield name, part
    modules = {p.module for p in wrong}
    if len(modules) < len({p.module for p in usable}):
        yield f"{len(modules)} of the modules", [p for p in usable if p.module in modules]


_BY_POWERS = {
    (1.0, 0.0): "LH201",
    (0.0, 0.0): "LH202",
    (0.0, -1.0): "LH202",
    (1.0, -0.5): "LH203",
    (2.0, -2.0): "LH206",
    (0.5, -0.5): "LH206",
}


def code_of(law: Law, *, fused_only: bool = False) -> str:
    """Return the code that names how `law` differs from strength * alpha / rank."""
    if (law.alpha_source, law.rank_source) != ("own", "own"):
        return "LH204"
    if law.strength.cost and not (law.alpha.cost or law.rank.cost):
        return "LH207"
    if law.alpha.cost and law.alpha.exponent is None:
        return "LH205"
    powers = law.alpha.exponent, law.rank.exponent
    if law.root and powers == (1.0, -1.0):
        return "LH203"
    if powers == ((1.0, -0.5) if law.root else (1.0, -1.0)):
        if fused_only and round(1 / law.constant, 6) in (2, 3, 4):
            return "LH208"
        return "LH206" if law.constant == 2.0 else "LH209"
    return next((code for known, code in _BY_POWERS.items() if known == powers), "LH209")


def law_record(law: Law) -> LawRecord:
    """Return the law as it stands in a verdict."""
    return LawRecord(
        formula=law.formula,
        name=law_name(law),
        exponents=law.exponents,  # type: ignore[arg-type]  # the keys are the three literals
        constant=law.constant,
        residual=law.residual,
        ambiguous=law.ambiguous,
        alternatives=law.alternatives,
    )


def law_name(law: Law) -> str:
    """Return the law's name in words: `as trained`, or the title of the code it deserves."""
    return "as trained" if law.is_trained else CODES[code_of(law)].title
