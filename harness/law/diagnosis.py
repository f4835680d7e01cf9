"""From probes to a diagnosis: the law that a loader or a merge follows, the code that names it, or what decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from harness.law.bent import bent
from harness.law.bounds import bounded, threshold
from harness.law.grammar import ALPHA, RANK, STRENGTH
from harness.law.identify import identify
from harness.law.law import Law
from harness.law.probe import Probe
from harness.law.rounding import rounding_of, rounds
from harness.law.traits import TRAITS, Input, Trait, borrowed, common_trait, kept_by_rank, one_input_decides
from harness.verdict.blocks import block_of
from harness.verdict.codes import CODES
from harness.verdict.verdict import LawRecord


@dataclass(frozen=True)
class Diagnosis:
    """The law of all probes when one explains them; else the law of those that are wrong and the trait they share."""

    law: Law | None
    code: str | None
    trait: Trait | None = None

    @property
    def family(self) -> str:
        """`strength` when only the strength is mishandled, else `scale`."""
        return "strength" if self.code == "LH207" else "scale"


def diagnose(probes: Sequence[Probe], *, unloaded: Iterable[str] = ()) -> Diagnosis:
    """Name the law of `probes`; `unloaded` are modules that coverage reports, so no law has to explain them."""
    skip = set(unloaded)
    usable = [p for p in probes if p.module not in skip]
    visible = any(abs(p.measured) > 4 * p.tolerance for p in usable)  # zeros alone fit many laws
    law = identify([p for p in usable if not p.permuted]) if visible else None
    if law is not None and not law.is_trained:
        return _named(law, usable)
    wrong = [p for p in usable if not p.right]
    if not wrong:
        return Diagnosis(law, None)
    return _by_part(usable, wrong) if visible else Diagnosis(None, "LH101")


def _named(law: Law, probes: Sequence[Probe], trait: Trait | None = None) -> Diagnosis:
    """Name a wrong law, of several that explain the probes the one that is met most."""
    fused = all(p.fused for p in probes)
    readings = (law, *law.others)
    likely = min(readings, key=lambda each: _rarity(each, fused))
    found = replace(likely, others=tuple(each for each in readings if each is not likely), residual=law.residual)
    code = _code_under(trait, code_of(found, fused_only=fused), found)
    return Diagnosis(found, code, trait or (None if found.others else rounding_of(found)))


def _rarity(law: Law, fused_only: bool) -> int:
    """Return the place of a law among those that explain the same probes, the one that is met most first."""
    code, plain = code_of(law, fused_only=fused_only), law.constant == 1.0
    factor = (law.exponents["alpha"], law.exponents["rank"]) == (1.0, -0.5 if law.root else -1.0)
    order = (
        plain and code in ("LH201", "LH202", "LH203"),
        plain and code == "LH207" and law.strength.exponent is not None,
        code == "LH208",
        factor and code == "LH206",  # doubled
        plain and code == "LH207",
        factor and code == "LH209",
        code in ("LH201", "LH202", "LH203", "LH207"),
    )
    return order.index(True) if True in order else len(order)


def _by_part(usable: Sequence[Probe], wrong: Sequence[Probe]) -> Diagnosis:
    """No one law explains everything: look for the part of the probes that is wrong and for that part's own law."""
    every, probes, in_order = wrong, usable, [p for p in usable if not p.permuted]
    if any(not p.right for p in in_order):  # in a file with permuted keys nobody can say which module is first
        usable, wrong = in_order, [p for p in in_order if not p.right]
    if rounded := rounds(every, probes):
        return Diagnosis(None, *rounded)
    silent = all(abs(p.measured) <= 4 * p.tolerance for p in wrong)
    telling = [p for p in usable if p.right and abs(p.expected) > 4 * p.tolerance]
    bound = bounded(wrong, telling)
    if found := _rank_bound(bound) or (None if silent else _lawful_part(usable, wrong, every)):
        return found
    exact = common_trait(wrong, telling)
    if exact and exact.about == "strength":
        return Diagnosis(None, "LH207", exact)
    if bound:
        return Diagnosis(None, *bound)
    if found := _per_block(usable):
        return found
    if by_rank := None if silent else kept_by_rank(wrong):
        return Diagnosis(None, "LH204", by_rank)
    law = identify(wrong) if len(wrong) >= _ENOUGH and not (silent or exact) else None
    if law is not None and not law.is_trained:
        values = (one_input_decides(name, every, telling) for name, _ in _INPUTS)
        deciding = next(filter(None, (threshold(every, telling), *values)), None)
        found = _named(law, wrong, deciding or Trait("some modules of some files", "part"))
        if all(_explains(found.law, p) for p in every):
            return found
    alpha = exact is not None and exact.about == "alpha"
    return Diagnosis(None, "LH205", exact) if alpha else _by_input(every, telling, exact, probes)


def _rank_bound(bound: tuple[str, Trait] | None) -> Diagnosis | None:
    """Name a bound on the rank first: beyond it the scale goes as alpha alone, by a constant that says nothing."""
    return Diagnosis(None, *bound) if bound and bound[1].about == "rank" else None


def _lawful_part(usable: Sequence[Probe], wrong: Sequence[Probe], every: Sequence[Probe]) -> Diagnosis | None:
    """Name the first part that follows a law of its own, which no wrong probe of permuted keys contradicts."""
    for trait, part in _parts(usable, wrong):
        law = identify(part)
        if law is None or law.is_trained:
            continue
        if trait.about == "place" or all(_explains(law, p) for p in every):
            return _named(law, part, trait)
    return None


def _explains(law: Law | None, probe: Probe) -> bool:
    """Whether `law` gives the measured scale; of permuted keys nobody knows whose alpha is the first.

    What a loader takes for an alpha that is not there, a law of alpha does not say.
    """
    if law is None:
        return False
    if probe.alpha is None and law.alpha.exponent != 0.0:
        return True
    ordered = (law.alpha_source, law.rank_source) != ("own", "own")
    return (probe.permuted and ordered) or abs(probe.measured - law.scale(probe)) <= 1.5 * probe.tolerance


def agrees(diagnosis: Diagnosis, probes: Sequence[Probe]) -> bool:
    """Whether none of `probes` contradicts what a diagnosis says: its law, and the condition that it is under."""
    wrong, trait = [p for p in probes if not p.right], diagnosis.trait
    if trait and trait.text in TRAITS:
        part = [p for p in probes if trait(p)]
        return all(map(trait, wrong)) and all(diagnosis.law is None or _explains(diagnosis.law, p) for p in part)
    return diagnosis.law is None or all(_explains(diagnosis.law, p) for p in (wrong if trait else probes))


def _by_input(
    wrong: Sequence[Probe], telling: Sequence[Probe], trait: Trait | None, probes: Sequence[Probe]
) -> Diagnosis:
    """Name what follows no law by the input that it depends on, or else by the trait."""
    if other := borrowed(wrong, probes):
        return Diagnosis(None, "LH204", other)
    if one := None if trait else bent(wrong, probes):
        return Diagnosis(None, *one)
    for name, code in () if trait else _INPUTS:
        if certain := one_input_decides(name, wrong, telling):
            return Diagnosis(None, code, certain)
    return Diagnosis(None, "LH209", trait)


_INPUTS: tuple[tuple[Input, str], ...] = (("alpha", "LH205"), ("strength", "LH207"))
_ENOUGH = 12  # wrong probes that follow one law by chance are fewer


def _code_under(trait: Trait | None, code: str, law: Law) -> str:
    """A loader that is wrong for some values of alpha only does not take alpha as it is; likewise the strength.

    Of some ranks only, a factor says that they count as another number, not how alpha is read.
    """
    if trait and trait.about == "strength":
        return "LH207"
    if trait and trait.about == "rank" and law.constant != 1.0:
        return "LH209"
    return "LH205" if code == "LH202" and trait and trait.about == "alpha" else code


def _per_block(usable: Sequence[Probe]) -> Diagnosis | None:
    """Name a constant of its own for each block of the model, when two modules at least show each."""
    blocks: dict[str, list[Probe]] = {}
    for probe in usable:
        blocks.setdefault(block_of(probe.module), []).append(probe)
    found = {block: _factor(group) for block, group in blocks.items()}
    factors = tuple((block, factor) for block, factor in found.items() if factor is not None)
    if None in found.values() or len({round(factor, 6) for _, factor in factors}) < 2:
        return None
    root = all(p.root for p in usable)
    law = Law(STRENGTH[0], ALPHA[0], RANK[2] if root else RANK[0], factors=factors, root=root)
    return Diagnosis(law, "LH209", Trait("each block of the model has a factor of its own", "part"))


def _factor(group: Sequence[Probe]) -> float | None:
    """Return measured / expected of one block, None when one module alone shows it, or it differs."""
    visible = [p for p in group if abs(p.expected) > 4 * p.tolerance]
    if len({p.module for p in visible}) < 2:
        return None
    factor = median(p.measured / p.expected for p in visible)
    near = all(abs(p.measured - factor * p.expected) <= 1.5 * p.tolerance for p in group)
    return factor if near else None


def _parts(usable: Sequence[Probe], wrong: Sequence[Probe]) -> Iterator[tuple[Trait, Sequence[Probe]]]:
    """Yield the parts of the probes that hold every wrong one: by trait, then by module."""
    for trait in TRAITS.values():
        if all(map(trait, wrong)) and not all(map(trait, usable)):
            yield trait, [p for p in usable if trait(p)]
    modules = {p.module for p in wrong}
    if not all(p.module in modules for p in usable):
        yield Trait(f"{len(modules)} of the modules", "part"), [p for p in usable if p.module in modules]


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


NO_LAW = LawRecord(formula="none", name="no single law for all modules")


def diagnosis_record(diagnosis: Diagnosis) -> LawRecord:
    """Return the law of a diagnosis as it stands in a verdict, NO_LAW where none was found."""
    return law_record(diagnosis.law) if diagnosis.law else NO_LAW


def law_record(law: Law) -> LawRecord:
    """Return the law as it stands in a verdict; where each block has a factor of its own there is no constant."""
    return LawRecord(
        formula=law.formula,
        name=law_name(law),
        exponents=law.exponents,  # type: ignore[arg-type]  # the keys are the three literals
        constant=None if law.factors else law.constant,
        residual=law.residual,
        ambiguous=law.ambiguous,
        alternatives=law.alternatives,
    )


def law_name(law: Law) -> str:
    """Return the law in words: `as trained`, a factor of it, or the titles of the codes of its readings."""
    if law.is_trained:
        return "as trained"
    return ", or ".join(dict.fromkeys(_reading(each) for each in (law, *law.others) if not each.is_trained))


def _reading(law: Law) -> str:
    factor = replace(law, constant=1.0).is_trained
    return f"{law.constant:.4g} times the trained scale" if factor else CODES[code_of(law)].title
