"""An observation: what one trial showed of every layer, as numbers to judge and as probes of the scaling law."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from harness.benches import Layer, View
from harness.checks.cell import Cell
from harness.example import Example, Target
from harness.isolation.calls import Raised
from harness.law.probe import Probe
from harness.measure.codes import rounded, through_own_codes
from harness.measure.compare import Fit, norm
from harness.measure.tolerance import UNIT_ROUNDOFF
from harness.variants import Update

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING_LIKE = 0.1  # a residual below a tenth of the change is a matter of precision, not of direction
_TWO_LOADS = 4  # times the tolerance of one: both sides of the comparison were rounded, some of them twice


@dataclass(frozen=True)
class Observation:
    """What one trial showed: a fit per target (whole layer first, then its slices), and what else changed.

    `order` lists the targets as the keys of the file stand; `ambiguous` are those whose alpha = 0 readers of the format
    take as 0 or as the rank; `bent` are layers of the model whose answers to dense input are not those of their weight,
    `unsteady` those that answer the same input differently when asked again; `training` are modules in training mode.
    `mistakes` say of layers whose change has another direction which mistake explains it, `earlier` what files loaded
    before hold for them. `drift` is how far apart the answers of models are that should answer alike, as a share of the
    LoRA's effect. `said` is what the loader said, where somebody listened. `additive`: the variant adds a
    multiple of its direction; `root`: training divided alpha by sqrt(rank). `tied` are layers outside the file that
    share their weight with one of it; `hosts` says of those that are rows of one layer of the model which that is.
    Of a load that `raised` there is nothing else.
    """

    example: Example
    fits: Mapping[str, tuple[Fit, ...]] = field(default_factory=dict)
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    products: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    others_changed: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    bent: tuple[str, ...] = ()
    unsteady: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    drift: float = 0.0
    mistakes: Mapping[str, str] = field(default_factory=dict)
    earlier: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    additive: bool = True
    root: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, str] = field(default_factory=dict)
    file_changed: bool = False
    order: tuple[str, ...] = ()
    ambiguous: frozenset[str] = frozenset()
    raised: Raised | None = None

    @property
    def zero_alpha(self) -> frozenset[str]:
        """How alpha = 0 was read here: `as 0`, `as the rank`, or in another way; empty where that does not show."""
        if self.example.strength == 0:
            return frozenset()
        found = set()
        for fit in (self.fits[name][0] for name in self.ambiguous if name in self.fits):
            near = max(fit.tolerance.scale, 0.01 * abs(self.example.strength))
            if fit.finite and min(abs(fit.scale), abs(fit.scale - self.example.strength)) <= near:
                found.add("as 0" if abs(fit.scale) <= near else "as the rank")
        return frozenset(found)

    def shows(self, target: Target) -> bool:
        """Whether the change that a module should make is one that rounding does not hide."""
        fit = self.fits[target.name][0] if target.name in self.fits else None
        return fit is not None and abs(fit.expected) * fit.product > fit.tolerance.noise / ROUNDING_LIKE

    def beside(self, name: str) -> list[str]:
        """Return the modules of the file that are other rows of the model's layer that `name` is in."""
        if (host := self.hosts.get(name)) is None:
            return []
        return [other for other in self.products if other != name and self.hosts.get(other) == host]

    def faint(self, names: Sequence[str]) -> bool:
        """Whether the changes of these layers are so small beside rounding that their direction cannot be told."""
        fits = (self.fits[name][0] for name in names)
        return all(fit.tolerance.noise > ROUNDING_LIKE * fit.change for fit in fits)


def observation_of(
    cell: Cell,
    example: Example,
    updates: Mapping[str, Update],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    plain: Mapping[str, Tensor] | None = None,
) -> Observation:
    """Compare the layers of the cell's view before and after a load of `example`, [rows, columns] in float64.

    `plain` are the layers before the loader made codes of them, where it does that.
    """
    fits: dict[str, tuple[Fit, ...]] = {}
    for target in example.targets:
        name, expected = target.name, example.strength * cell.variant.scale(target)
        both = before[name], after[name], updates[name], cell.view.slices(name)
        layer = cell.view.layers[name]
        seen = cell.variant.fits(*both, expected=expected, dtype=example.dtype, layer=layer)
        fits[name] = seen if plain is None else _through_own_codes(seen, plain[name], before[name], both[-1])
    touched = [name for name in cell.view.layers if after[name] is not before[name]]
    untouched = [name for name in touched if name not in fits]
    limits = {name: _unchanged_limit(before[name], cell.view.layers[name], example.dtype) for name in untouched}
    changed = tuple(name for name, limit in limits.items() if norm(after[name] - before[name]) > limit)
    wrong = [t for t in example.targets if _doubtful(fits[t.name][0], cell.view.layers[t.name])]
    zero = (t.name for t in example.targets if t.alpha == 0 and cell.zero_alpha_is_ambiguous)
    return Observation(
        example,
        fits,
        {name: after[name] - before[name] for name in (*fits, *changed)},
        {name: update.direction.product for name, update in updates.items()},
        {name: cell.view.layers[name].kernel for name in fits},
        changed,
        tuple(name for name in touched if not bool(after[name].isfinite().all())),
        ambiguous=frozenset(zero),
        additive=cell.variant.additive,
        root=cell.variant.root,
        tied=_tied(cell, fits),
        hosts=cell.view.hosts,
        mistakes={t.name: what for t in wrong if (what := _mistake(cell, example, t, fits, updates, before, after))},
    )


def _through_own_codes(fits: tuple[Fit, ...], plain: Tensor, coded: Tensor, slices: Sequence[slice]) -> tuple[Fit, ...]:
    parts = zip(fits, (slice(0, len(plain)), *slices), strict=False)
    return tuple(through_own_codes(fit, plain[rows], (coded - plain)[rows]) for fit, rows in parts)


def _tied(cell: Cell, targets: Mapping[str, object]) -> dict[str, str]:
    """Return the layers outside the file that share their weight with one of the file, with that one."""
    pairs = [pair for own, other in cell.bench.shared.items() for pair in ((own, other), (other, own))]
    return {outside: target for outside, target in pairs if target in targets and outside not in targets}


def _mistake(
    cell: Cell,
    example: Example,
    target: Target,
    fits: Mapping[str, tuple[Fit, ...]],
    updates: Mapping[str, Update],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> str | None:
    weights = before[target.name], after[target.name], updates[target.name]
    expected = example.strength * cell.variant.scale(target)
    layer, left = cell.view.layers[target.name], fits[target.name][0].residual
    return cell.variant.mistake(*weights, expected=expected, strength=example.strength, residual=left, layer=layer)


def _unchanged_limit(weight: Tensor, layer: Layer, dtype: str) -> float:
    """An untouched layer may be re-cast, to its codes where it has some (one rounding), nothing more."""
    recast = 2 * UNIT_ROUNDOFF[dtype] * norm(weight)
    return max(recast, 2 * norm(rounded(layer, weight) - weight)) if layer.codes else recast


def _doubtful(fit: Fit, layer: Layer) -> bool:
    """Whether a mistake of the variant may explain a change: also one whose direction rounding hides, but for codes."""
    return wrong_direction(fit) or not (layer.codes or (fit.direction_right and fit.scale_right))


def wrong_direction(fit: Fit) -> bool:
    """True when the change is not explained by any multiple of B @ A, beyond what a coarser dtype would do."""
    return not fit.unchanged and not fit.direction_right and fit.relative_residual > ROUNDING_LIKE


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
            file_dtype=example.file_dtype,
            square=view.layers[name].rows == view.layers[name].columns,
            fused=len(view.slices(name)) > 1,
            permuted=example.key_seed != 0,
            patterns=example.patterns,
            root=root,
        )
        for name in targets
    ]


def probes_of(observation: Observation, cell: Cell) -> Iterator[Probe]:
    """Yield a probe per target whose alpha is plain, whose direction is right and whose scale survived rounding."""
    if observation.raised:
        return
    for probe in unmeasured_probes(observation.example, cell.view, observation.order, root=cell.variant.root):
        fits = observation.fits[probe.module]
        lost = not fits[0].finite or wrong_direction(fits[0]) or fits[0].faint or probe.module in observation.mistakes
        if not lost and probe.module not in observation.ambiguous:
            yield replace(probe, measured=fits[0].scale, tolerance=_allowed(fits))


def _allowed(fits: Sequence[Fit]) -> float:
    """Return the tolerance of the whole layer's scale: at least the unexplained part, unless its slices explain it."""
    whole, slices = fits[0], fits[1:]
    explained = whole.direction_right or (slices and all(f.direction_right for f in slices))
    if explained or not whole.product:
        return whole.tolerance.scale
    return max(whole.tolerance.scale, whole.residual / whole.product)


def _unsure(fit: Fit) -> float:
    """Return what rounding, or a noise that the loader adds to right weights, leaves of the change unexplained."""
    return fit.tolerance.noise if wrong_direction(fit) else max(fit.tolerance.noise, fit.residual)


def changed_otherwise(once: Observation, seen: Observation) -> list[str]:
    """Return the layers of the file whose change is not the one of a plain load, the furthest off first."""
    off = {name: norm(seen.changes[name] - once.changes[name]) for name in once.fits}
    allowed = {name: _TWO_LOADS * _unsure(fits[0]) for name, fits in once.fits.items()}
    wrong = [name for name in off if not off[name] <= allowed[name]]
    return sorted(wrong, key=lambda name: -off[name] / (allowed[name] or 1.0))
