"""Scale and strength: the measured factor on B @ A is strength * alpha / rank; if not, which law it follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from harness.benches import View
from harness.checks.direction import ROUNDING_LIKE, wrong_direction
from harness.checks.finding import Finding
from harness.checks.trial import Observation
from harness.example import Example
from harness.law.law import Law, identify
from harness.law.probe import Probe
from harness.law.traits import TRAITS, borrowed, common_trait, one_input_decides
from harness.measure.compare import Fit


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


def check_scale(observation: Observation, *, zero_alpha_ambiguous: bool = False) -> list[Finding]:
    """LH209 (named later from the law) for modules, or slices of them, whose measured scale is not the expected one.

    With `zero_alpha_ambiguous` alpha = 0 may be read as 0 or as the rank (scale 1): a split convention of the format.
    """
    strength, wrong = observation.example.strength, []
    alphas = {t.name: t.alpha for t in observation.example.targets}
    for name, fits in observation.fits.items():
        if not fits[0].finite or wrong_direction(fits[0]) or all(f.scale_right or f.blurred for f in fits[1:] or fits):
            continue
        if (
            zero_alpha_ambiguous
            and alphas[name] == 0
            and abs(fits[0].scale - strength) <= _around(fits[0].tolerance.scale, strength)
        ):
            continue
        wrong.append(name)
    if not wrong:
        return []
    wrong.sort(key=lambda name: -_excess(observation, name))
    faint = all(fit.tolerance.noise > ROUNDING_LIKE * fit.change for fit in (observation.fits[n][0] for n in wrong))
    return [Finding("LH209", observation, tuple(wrong), _fact(observation, wrong), faint)]


def unmeasured_probes(
    example: Example, view: View, order: Sequence[str] | None = None, *, root: bool = False
) -> list[Probe]:
    """Return a probe without a measurement per target; `order` is that of the file's keys (default: the targets')."""
    targets = {t.name: t for t in example.targets}
    order = list(targets) if order is None else order
    alphas = tuple(targets[name].alpha for name in order)
    ranks = tuple(targets[name].rank for name in order)
    return [
        Probe(
            name,
            example.strength,
            order.index(name),
            alphas,
            ranks,
            0.0,
            0.0,
            dtype=example.dtype,
            square=view.layers[name].rows == view.layers[name].columns,
            fused=len(view.slices(name)) > 1,
            permuted=example.key_seed != 0,
            root=root,
        )
        for name in targets
    ]


def probes_of(observation: Observation, view: View, *, root: bool = False) -> list[Probe]:
    """Turn an observation into probes, one per target whose direction is right and whose scale survived rounding."""
    return [
        replace(probe, measured=fits[0].scale, tolerance=_allowed(fits))
        for probe in unmeasured_probes(observation.example, view, observation.order, root=root)
        if (fits := observation.fits[probe.module])[0].finite and not (wrong_direction(fits[0]) or fits[0].faint)
    ]


def _allowed(fits: Sequence[Fit]) -> float:
    """Return the tolerance of the whole layer's scale: at least the unexplained part, unless its slices explain it."""
    whole, slices = fits[0], fits[1:]
    explained = whole.direction_right or (slices and all(f.direction_right for f in slices))
    if explained or not whole.product:
        return whole.tolerance.scale
    return max(whole.tolerance.scale, whole.residual / whole.product)


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


def _around(allowed: float, strength: float) -> float:
    return max(allowed, 0.01 * abs(strength))


def _excess(observation: Observation, name: str) -> float:
    return max(abs(f.scale - f.expected) / f.tolerance.scale for f in observation.fits[name])


def _fact(observation: Observation, wrong: Sequence[str]) -> str:
    worst = max(observation.fits[wrong[0]], key=lambda f: abs(f.scale - f.expected))
    where = f"{len(wrong)} of {len(observation.fits)} modules"
    if worst.expected == 0:
        return f"delta is {worst.scale:.3f} x B @ A in {where}, but should be 0"
    return f"delta is {worst.scale / worst.expected:.3f}x the expected delta in {where}"
