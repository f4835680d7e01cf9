"""Scale and strength: the measured factor on B @ A is strength * alpha / rank; if not, its law is named later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.checks.cell import Cell
from harness.checks.family import Scenario, Sighting, first_wrong, follows, has, judges, near
from harness.checks.observation import Observation, changed_otherwise, wrong_direction
from harness.checks.trial import load, run_trial, set_strength
from harness.checks.trial_files import rewrite
from harness.checks.unloaded import weights_seen
from harness.files import FORMATS
from harness.measure.compare import norm
from harness.text import count

_SET_LATER = (
    Scenario(
        "LH207",
        (load(0.5), set_strength(1)),
        (1,),
        "loading at half the strength and setting all of it",
        "set_strength",
    ),
    Scenario(
        "LH207",
        (load(), set_strength(0.5)),
        (0.5,),
        "setting half the strength without loading again",
        "set_strength",
    ),
    Scenario(
        "LH207",
        (load(), set_strength(0), set_strength(1.5)),
        (1.5,),
        "setting strength 0, then 1.5 times the first",
        "set_strength",
    ),
    Scenario("LH207", (load(), set_strength(0)), (0,), "setting strength 0 without loading again", "set_strength"),
)
_SET_ALL = _SET_LATER[:1]
_LARGE = 16  # alpha / rank
_MOST_WHOLE = 2.0**24  # of float32: alphas above it, infinite ones and NaN are no integers of a file
_NEGATIVE = Scenario(
    "LH207",
    (load(), set_strength(-0.5)),
    (-0.5,),
    "setting minus half the strength without loading again",
    "set_strength",
)
_ROUNDINGS, _NEAR = 4, 1e-4  # times the tolerance of one load; a share of the change, which is large at strength 2
_BY_DEFAULT = (Scenario("LH207", (load(None),), (1,), "loading without saying a strength"),)
_AFTER_ANOTHER = Scenario(
    "LH207", (load(0.25), load(None)), (1, 1.25), "loading at a quarter, then without saying a strength"
)
_SAID_AGAIN = replace(_AFTER_ANOTHER, steps=(load(0.25), load()))


@judges(
    "scale",
    finds="the law: alpha not divided, ignored, one for all modules, truncated, applied twice",
    codes=("LH201", "LH203", "LH204", "LH205", "LH206", "LH208", "LH209"),
)
def check_scale(observation: Observation) -> list[Sighting]:
    """LH209 (named later from the law) for modules, or slices of them, whose measured scale is not the expected one."""
    wrong = [name for name in observation.fits if _wrong(observation, name)]
    if not wrong or observation.unsteady:  # said already
        return []
    unmoved = {name for name in wrong if all(near(fit, 0.0) for fit in observation.fits[name])}
    wrong.sort(key=lambda name: (name in unmoved, -_excess(observation, name)))
    fact, faint = _fact(observation, wrong), observation.faint(wrong)
    return [Sighting("LH209", observation, tuple(wrong), fact, faint, unmoved=len(unmoved) == len(wrong))]


@follows("strength", finds="ignored, zero or negative not honoured, set later, another default", codes=("LH207",))
def check_strength(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """LH207 when a strength set without loading again is not honoured, or the one that nobody says is not 1."""
    set_later = tuple(first_wrong(cell, once, _SET_LATER)) or tuple(_set_at_another_scale(cell, once))
    yield from set_later or first_wrong(cell, once, [_NEGATIVE], may_raise=True)  # some take none below zero
    if once.example.strength == 1:
        yield from first_wrong(cell, once, _BY_DEFAULT, may_raise=True)  # some loaders have no default
        kept = tuple(first_wrong(cell, once, [_AFTER_ANOTHER], may_raise=True))
        yield from kept if kept and not any(first_wrong(cell, once, [_SAID_AGAIN])) else ()
        yield from _by_readings(cell, once)


def _set_at_another_scale(cell: Cell, once: Observation) -> Iterator[Sighting]:
    """Set the strength of a file whose alpha / rank is large: what set it may have a law of its own."""
    if not has(cell, "set_strength") or not cell.has_alpha:
        return
    large = tuple(replace(target, alpha=float(_LARGE * target.rank)) for target in once.example.targets)
    seen = run_trial(cell, replace(once.example, targets=large))
    if not seen.raised:
        yield from first_wrong(cell, seen, _SET_ALL)


@follows("scale", finds="alpha stored as a whole number", codes=("LH202",))
def check_whole_alpha(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """LH202 when the same file with its alphas stored as integers is another LoRA, LH9xx where it fails there."""
    row, targets = FORMATS[cell.format], once.example.targets
    if row.alpha[0] != "tensor" or row.suffix != ".safetensors" or not all(_is_whole(t.alpha) for t in targets):
        return
    seen, where = run_trial(cell, once.example, edit=_with_whole_alphas), "where alpha is stored as an integer"
    if seen.raised:
        yield Sighting(seen.raised.code, seen, fact=f"{seen.raised.what}; {where}")
    elif names := changed_otherwise(once, seen):
        yield Sighting("LH202", seen, tuple(names), f"{len(names)} of {len(once.fits)} layers are others {where}")


def _is_whole(alpha: float | None) -> bool:
    return alpha is not None and 0 < abs(alpha) < _MOST_WHOLE and float(alpha).is_integer()


def _with_whole_alphas(path: Path) -> None:
    rewrite(path, lambda own: {k: v.long() if k.endswith(".alpha") else v for k, v in own.items()})


_OTHER_STRENGTHS = (0.5, 2.0, 0.0, -1.0)


def _by_readings(cell: Cell, once: Observation) -> Iterator[Sighting]:
    """LH207 where a strength other than 1 follows none of the readings of a variant, or several in turn."""
    common = set[str]()
    if not all(fits[0].direction_right and fits[0].scale_right for fits in once.fits.values()):
        return  # said already
    for number, strength in enumerate(
        _OTHER_STRENGTHS if cell.variant.readings and cell.subject.strength_argument else ()
    ):
        seen = run_trial(cell, replace(once.example, strength=strength))
        if seen.raised:
            return  # to refuse other strengths is one way of not being wrong about them
        found = _readings(cell, once, seen)
        common = found if number == 0 else common & found
        if not common:
            fact = f"at strength {strength:g} the layers are by no reading of it what they should be"
            yield Sighting("LH207", seen, tuple(seen.fits)[:1], fact)
            return


def _readings(cell: Cell, once: Observation, seen: Observation) -> set[str]:
    """Return the readings of the strength that explain every layer."""
    assert cell.variant.readings is not None
    base = weights_seen(cell.view, cell.bench, seen.example.dtype, cell.variant.bias)
    updates, names = cell.variant.updates(seen.example, cell.view, base), set[str]()
    for number, target in enumerate(seen.example.targets):
        before, noise = base[target.name], _ROUNDINGS * once.fits[target.name][0].tolerance.noise
        known = cell.variant.readings(
            before, updates[target.name], expected=cell.variant.scale(target), strength=seen.example.strength
        )
        change = seen.changes[target.name]
        close = {name for name, weight in known if norm(weight - before - change) <= max(noise, _NEAR * norm(change))}
        names = close if number == 0 else names & close
    return names


def _wrong(observation: Observation, name: str) -> bool:
    whole, *slices = observation.fits[name]
    said = wrong_direction(whole) or name in observation.mistakes
    if not whole.finite or said or all(f.scale_right or f.blurred for f in slices or [whole]):
        return False
    strength = observation.example.strength
    as_rank = abs(whole.scale - strength) <= max(whole.tolerance.scale, 0.01 * abs(strength))
    return not (name in observation.ambiguous and as_rank)


def _excess(observation: Observation, name: str) -> float:
    return max(abs(f.scale - f.expected) / f.tolerance.scale for f in observation.fits[name])


def _fact(observation: Observation, wrong: Sequence[str]) -> str:
    worst = max(observation.fits[wrong[0]], key=lambda f: abs(f.scale - f.expected))
    where = f"{len(wrong)} of {count(len(observation.fits), 'module')}"
    if worst.expected == 0:
        return f"delta is {worst.scale:.3f} x B @ A in {where}, but should be 0"
    return f"delta is {_ratio(worst.scale / worst.expected)}x the expected delta in {where}"


def _ratio(ratio: float) -> str:
    """Return a ratio with three digits behind the point, or as many as it takes not to look like 1."""
    digits = (f"{ratio:.{number}f}" for number in range(3, 13))
    return next((text for text in digits if float(text) != 1.0), f"{ratio!r}").replace("-0.000", "0.000")
