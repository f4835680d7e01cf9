"""A variant: which tensors a module of the file has, and what they add to the weight of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from harness.benches import Bench, View
from harness.benches.layer import Kind, Layer
from harness.example import Example, Target
from harness.law.scale import trained_scale
from harness.measure.codes import CodesReference, rounded, through_codes
from harness.measure.compare import Direction, Fit, fit, fit_slices, norm

if TYPE_CHECKING:
    from torch import Generator, Tensor

Parts = Mapping[str, "Tensor"]
Topology = Literal["own", "split", "merged"]
_SAME = 0.02  # of a change: one mistake is that near to itself in any dtype, and no two of them are to each other
_EQUAL = 1e-6  # of a change: at strength 1, or alpha = rank, some mistakes are none
_STEP = 1e-3  # of scale, over which a slope is taken
_ENERGY = 0.7  # |delta| / |W| at the trained scale: large enough that a 1 % error stands out of bfloat16 rounding


@dataclass(frozen=True)
class Update:
    """One module of a drawn LoRA: its tensors by role, as the file stores them, and what one unit of scale adds."""

    parts: Parts
    direction: Direction


class FitOne(Protocol):
    """Compare one layer before and after loading with an update of the variant."""

    def __call__(self, before: Tensor, after: Tensor, update: Update, *, expected: float, dtype: str) -> Fit:
        """Return the fit; `before` and `after` are [rows, columns] in float64."""


def fit_sum(before: Tensor, after: Tensor, update: Update, *, expected: float, dtype: str) -> Fit:
    """Fit a variant that adds a multiple of its direction."""
    return fit(before, after, update.direction, expected=expected, dtype=dtype)


def exact_sum(before: Tensor, update: Update, scale: float) -> Tensor:
    """Return W + scale * direction."""
    return before.double() + scale * update.direction.product


class Mistakes(Protocol):
    """Yield what loaders are known to make of a layer instead: in words, and the weight [rows, columns] in float64."""

    def __call__(
        self, before: Tensor, update: Update, *, expected: float, strength: float
    ) -> Iterable[tuple[str, Tensor]]:
        """Return them; `expected` is the whole factor on the direction, `strength` the part of it that a user says."""


def no_mistakes(before: Tensor, update: Update, *, expected: float, strength: float) -> Iterable[tuple[str, Tensor]]:
    """Return nothing."""
    return ()


@dataclass(frozen=True)
class Variant:
    """One kind of module.

    `draw(layer, rank, generator)` gives the tensors by role in float32; `direction(parts, layer)` what they add per
    unit of scale, where the scale is alpha / rank, alpha / sqrt(rank) with `root`, or 1 without `alpha`, whatever lies
    `beside` the parts of its own. `gain` are the roles that carry the size. `formats` (None: all) can say it and
    `kinds` of layers can have it, of those the ones it `wants`. `bias`: it changes biases too, which are then the last
    column. `split`: each projection of a merged layer can be fitted on its own, as a multiple of its direction.
    `strengths`: what a strength other than 1 means is left to the loader when there is only one. `exact(W, update,
    scale)` is the weight that it makes of W. Two loads of a variant that is not `additive` have no meaning that
    everybody shares. `readings` are what other strengths may mean then.
    """

    name: str
    draw: Callable[[Layer, int, Generator], dict[str, Tensor]]
    direction: Callable[[Parts, Layer], Direction]
    gain: tuple[str, ...] = ("B",)
    kinds: frozenset[Kind] = frozenset({"linear", "transposed"})
    formats: frozenset[str] | None = None
    alpha: bool = True
    beside: str = ""
    root: bool = False
    bias: bool = False
    split: bool = True
    additive: bool = True
    topology: Topology = "own"
    strengths: tuple[float, ...] = ()
    max_rank: Callable[[Layer], int] = lambda layer: 128
    wants: Callable[[Layer], bool] = lambda layer: True
    fit: FitOne = fit_sum
    exact: Callable[[Tensor, Update, float], Tensor] = exact_sum
    mistakes: Mistakes = no_mistakes
    readings: Mistakes | None = None

    @property
    def factor(self) -> str:
        """The trained factor on the direction, times the strength, as a formula."""
        divisor = " * alpha / sqrt(rank)" if self.root else " * alpha / rank"
        return f"strength{divisor}" if self.alpha else "strength"

    def view(self, bench: Bench) -> View | None:
        """Return the layers of `bench` as a file of this variant names them; None: it has no such form."""
        return {"own": bench.view, "split": bench.split_view, "merged": bench.merged_view}[self.topology]

    def targets(self, view: View) -> tuple[str, ...]:
        """Return the layers of `view` that can have this variant."""
        return tuple(n for n in view.lora_layers if self._holds(view.layers[n]))

    def _holds(self, layer: Layer) -> bool:
        return layer.kind in self.kinds and (layer.bias or not self.bias) and self.wants(layer)

    def rank_limit(self, view: View) -> int:
        """Return the largest rank that every target can have."""
        return min((self.max_rank(view.layers[name]) for name in self.targets(view)), default=1)

    def scale(self, target: Target) -> float:
        """Return the trained factor on the direction."""
        return trained_scale(target.alpha if self.alpha else None, target.rank, rslora=self.root)

    def updates(self, example: Example, view: View, weights: Mapping[str, Tensor]) -> dict[str, Update]:
        """Draw the modules of `example` in the file's dtype; `weights` are the base's, [rows, columns].

        The tensors are standard normal, then the `gain` is scaled by a power of two so that the trained delta has about
        0.7 times the norm of W: every law then shows, whatever rank and alpha were drawn.
        """
        return {
            t.name: self._update(example, index, t, view.layers[t.name], weights[t.name])
            for index, t in enumerate(example.targets)
        }

    def _update(self, example: Example, index: int, target: Target, layer: Layer, weight: Tensor) -> Update:
        import torch

        generator = torch.Generator().manual_seed(1_000_003 * example.value_seed + index)
        drawn = self.draw(layer, target.rank, generator)
        size = abs(self.scale(target) or 1.0) * float(torch.linalg.matrix_norm(self.direction(drawn, layer).product))
        whole = float(torch.linalg.matrix_norm(weight)) or 1.0
        factor = 2.0 ** round(math.log2(_ENERGY * whole / size))
        dtype = getattr(torch, example.file_dtype)
        parts = {role: (t * factor if role in self.gain else t).to(dtype) for role, t in drawn.items()}
        return Update(parts, self.direction(parts, layer))

    def mistake(
        self,
        before: Tensor,
        after: Tensor,
        update: Update,
        *,
        expected: float,
        strength: float,
        residual: float = math.inf,
        layer: Layer | None = None,
    ) -> str | None:
        """Return which known mistake of this variant explains the layer that was measured, None when none does.

        It explains more than a scale of its own does, and is none where it comes to the same as what is right. Where
        `layer` is quantised it is the nearest of those that are as near as its codes are to the mistake itself.
        """
        right = self.exact(before, update, expected)
        same = _EQUAL * norm(right - before)
        every = self.mistakes(before, update, expected=expected, strength=strength)
        known = [(what, weight) for what, weight in every if norm(weight - right) > same]
        limit = min(_SAME * norm(after - before), residual)
        if layer is None or not layer.codes:
            return next((what for what, weight in known if norm(after - weight) <= limit), None)
        coded = [(what, weight, rounded(layer, weight)) for what, weight in known]
        near = [(norm(after - w), what) for what, weight, w in coded if norm(after - w) <= max(limit, norm(w - weight))]
        return min(near)[1] if near else None

    def fits(
        self,
        before: Tensor,
        after: Tensor,
        update: Update,
        slices: Sequence[slice],
        *,
        expected: float,
        dtype: str,
        layer: Layer | None = None,
    ) -> tuple[Fit, ...]:
        """Return the fit of the whole layer, then those of its slices when it stacks several projections.

        Where `layer` is quantised the tolerance is what its codes need.
        """
        seen = self._fits(before, after, update, slices, expected=expected, dtype=dtype)
        if layer is None or not layer.codes:
            return seen
        merged = partial(self._references, before, after, update, slices, layer, dtype=dtype)
        references = [merged(scale) for scale in (expected, seen[0].scale) if math.isfinite(scale)]
        references += [merged(each[0].scale + each[0].lost) for each in references[1:]]
        return tuple(through_codes(fit, each) for fit, each in zip(seen, zip(*references, strict=True), strict=True))

    def _references(
        self,
        before: Tensor,
        after: Tensor,
        update: Update,
        slices: Sequence[slice],
        layer: Layer,
        scale: float,
        *,
        dtype: str,
    ) -> tuple[CodesReference, ...]:
        """Return an exact sum rounded to the codes of `layer`: as a whole, and of the slices that are fitted."""
        exact = self.exact(before, update, scale)
        slopes = self.exact(before, update, scale + _STEP) - exact
        merged = rounded(layer, exact)
        fits = self._fits(before, merged, update, slices, expected=scale, dtype=dtype)
        return tuple(
            CodesReference(
                scale,
                fit,
                norm(merged[rows]),
                norm((merged - exact)[rows]),
                norm((after - merged)[rows]),
                norm(slopes[rows]) / _STEP,
                exact[rows].numel(),
            )
            for fit, rows in zip(fits, (slice(0, len(before)), *slices), strict=False)
        )

    def _fits(
        self, before: Tensor, after: Tensor, update: Update, slices: Sequence[slice], *, expected: float, dtype: str
    ) -> tuple[Fit, ...]:
        whole = self.fit(before, after, update, expected=expected, dtype=dtype)
        if len(slices) < 2 or not self.split:
            return (whole,)
        return (whole, *fit_slices(before, after, update.direction, slices, expected=expected, dtype=dtype))
