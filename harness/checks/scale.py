"""Scale and strength: the measured factor on B @ A is strength * alpha / rank; if not, which law it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.benches import View
from harness.checks.direction import ROUNDING_LIKE, wrong_direction
from harness.checks.finding import Finding
from harness.checks.trial import Observation
from harness.example import Example
from harness.law.probe import Probe
from harness.measure.compare import Fit


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
