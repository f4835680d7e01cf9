"""Engines that give only outputs: the scale of one module at a time, fitted so that the reference answers the same.

For a file with one module the reference's answer is f(s), the bench with W + s * B @ A in that layer. The engine's
answer y is compared as a difference from its own answer y0 to a file with B = 0, so that an offset of its own
(half precision, another kernel) does not count:

    s = argmin |(y - y0) - (f(s) - f(0))|

Its tolerance is a few times the engine's own error, |y0 - f(0)| relative to |f(0)|, or what is left over where that is
more, over the slope |f'(s)|. Nothing but scales shows in this way: weights, biases and what a load leaves behind are
not judged.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.benches import Bench
from harness.checks.cell import Cell
from harness.checks.families.coverage import check_coverage
from harness.checks.families.scale import check_scale
from harness.checks.families.smoke import check_smoke
from harness.checks.family import Sighting
from harness.checks.observation import ROUNDING_LIKE, Observation
from harness.checks.trial import ask
from harness.checks.trial_files import write_example
from harness.checks.unloaded import base_weights
from harness.checks.work import Order
from harness.example import Example, Target
from harness.isolation.calls import CallFailedError, Raised, lost_raised
from harness.isolation.subject import SubjectLostError
from harness.measure.compare import Fit, norm
from harness.measure.tolerance import Tolerance
from harness.variants import Update

if TYPE_CHECKING:
    from torch import Tensor

SEEN = frozenset({"smoke", "coverage", "direction", "scale", "strength"})
"""The families that outputs show something of."""
NOT_SEEN = "not judged: an engine that gives only outputs shows no weights and no model after a load"
_LEAST_ERROR, _SIGMAS = 1e-5, 4.0
_MOST_ERROR = 0.05  # of the outputs without a LoRA: more says that it is another model
_STEPS, _STEP, _NEAR_ENOUGH = 8, 1e-4, 1e-8
_REFINED = 3


@dataclass(frozen=True)
class OutputTolerance(Tolerance):
    """What the engine's own error makes of the scale."""

    def why(self) -> str:
        """Say in a few words where the numbers come from."""
        return f"{_SIGMAS:.0f} times how far off the engine is without a LoRA, over the slope of the outputs"


def observe_outputs(cell: Cell, example: Example) -> Observation:
    """Have the engine answer with the one module of `example`, and find the scale behind its answer."""
    (target,) = example.targets
    base = cell.view.gather(base_weights(cell.bench, example.dtype))
    updates = cell.variant.updates(example, cell.view, base)
    try:
        if "plain" not in cell.kept:
            cell.kept["plain"] = _answer(cell, example, _without_effect(updates))
        plain: Tensor = cell.kept["plain"]
        given = _answer(cell, example, updates)
    except SubjectLostError as lost:
        return Observation(example, raised=lost_raised(lost))
    except CallFailedError as failed:
        return Observation(example, raised=failed.raised)
    return _observation(cell, example, target, _Reference(cell.bench, target.name, updates[target.name]), plain, given)


def judge_outputs(observation: Observation) -> list[Sighting]:
    """Return what is wrong with one answer."""
    if observation.raised:
        return list(check_smoke(observation))
    (name,) = observation.fits
    fit = observation.fits[name][0]
    if not fit.unchanged and not fit.direction_right and fit.relative_residual > ROUNDING_LIKE:
        fact = f"no scale of B @ A gives these outputs: the best one leaves {fit.relative_residual:.0%} of the change"
        return [Sighting("LH306", observation, (name,), fact)]
    return list(check_coverage(observation)) or list(check_scale(observation))


def _without_effect(updates: Mapping[str, Update]) -> dict[str, Update]:
    zero = {name: {role: t * (role != "B") for role, t in update.parts.items()} for name, update in updates.items()}
    return {name: replace(update, parts=zero[name]) for name, update in updates.items()}


def _answer(cell: Cell, example: Example, updates: Mapping[str, Update]) -> Tensor:
    """Return the output of the model with these modules, in float64.

    Raises:
        CallFailedError: the engine raised, or answered with another shape.
        SubjectLostError: nothing came back, or something else.
    """
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        path = write_example(cell, example, updates, Path(folder))
        order = Order(cell.bench_name, example.dtype, (("load", example.strength, str(path)),), cell.allowed)
        answer = ask(cell, example, order)
    wanted = cell.bench.forward(cell.bench.base()).shape
    if isinstance(answer, dict) and isinstance(answer.get("raised"), dict) and "what" in answer["raised"]:
        raise CallFailedError(Raised(**answer["raised"]))
    output = (answer.get("tensors") or {}).get("output") if isinstance(answer, dict) else None
    if output is None:
        raise SubjectLostError("raised", "its process sent no output")
    if output.shape != wanted:
        what = f"the engine answers {list(output.shape)}, but should answer {list(wanted)}"
        raise CallFailedError(Raised("LH902", what))
    return output.double()  # type: ignore[no-any-return]


def _observation(
    cell: Cell, example: Example, target: Target, reference: _Reference, plain: Tensor, given: Tensor
) -> Observation:
    zero = reference.at(0.0)
    error = max(_LEAST_ERROR, norm(plain - zero) / norm(zero))
    if not error <= _MOST_ERROR:
        what = f"without a LoRA its outputs are {error:.0%} off the model's: no scale can be told from them"
        return Observation(example, raised=Raised("LH902", what))
    if not bool(given.isfinite().all()):
        return Observation(example, raised=Raised("LH902", "the engine answers NaN or infinity"))
    expected = example.strength * cell.variant.scale(target)
    allowed = _SIGMAS * error * max(norm(given), norm(zero))
    scale, rest, slope = reference.scale_behind(given - plain, list(_likely(example, target)), allowed)
    blur = max(allowed, rest) / slope if slope else math.inf
    tolerance = OutputTolerance(blur, allowed, "float32")
    fit = Fit(scale, rest, norm(given - plain), slope, tolerance, expected, blur)
    ambiguous = frozenset({target.name} if target.alpha == 0 else ())
    fits, root = {target.name: (fit,)}, cell.variant.root
    return Observation(example, fits, order=(target.name,), ambiguous=ambiguous, root=root)


class _Reference:
    """The bench with a multiple of one module's B @ A in its layer, in float64."""

    def __init__(self, bench: Bench, layer: str, update: Update) -> None:
        import torch

        self._bench, self._model = bench, bench.build(torch.float64)
        module = self._model.get_submodule(layer)
        self._weight: Tensor = module.weight.data  # type: ignore[assignment]
        self._base = self._weight.clone()
        product, turned = update.direction.product, bench.layers[layer].kind in ("transposed", "embedding")
        self._product = product.T if turned else product.reshape(self._base.shape)

    def at(self, scale: float) -> Tensor:
        """Return f(scale)."""
        self._weight.copy_(self._base + scale * self._product)
        return self._bench.forward(self._model).double()

    def scale_behind(self, change: Tensor, starts: list[float], enough: float) -> tuple[float, float, float]:
        """Return the scale whose outputs change by `change`, what that leaves over, and the slope |f'| there.

        It is looked for from the likeliest of `starts` on, until no more than `enough` is left over.
        """
        zero = self.at(0.0)

        def rest(scale: float) -> Tensor:
            return change - (self.at(scale) - zero)

        found = sorted(starts, key=lambda scale: norm(rest(scale)))[:_REFINED]
        best, left = 0.0, math.inf
        for start in found:
            scale = self._refined(start, rest)
            if (over := norm(rest(scale))) < left:
                best, left = scale, over
            if left <= enough:
                break
        return best, left, norm(self._slope(best))

    def _slope(self, scale: float) -> Tensor:
        step = _STEP * max(1.0, abs(scale))
        return (self.at(scale + step) - self.at(scale - step)) / (2 * step)

    def _refined(self, scale: float, rest: Callable[[float], Tensor]) -> float:
        """Return the scale to which Gauss and Newton lead from `scale`, never uphill."""
        left = rest(scale)
        for _ in range(_STEPS):
            slope = self._slope(scale)
            energy = float((slope * slope).sum())
            step = float((slope * left).sum()) / energy if energy else 0.0
            while step and norm(after := rest(scale + step)) > norm(left):
                step = step / 2 if abs(step) > _NEAR_ENOUGH * max(1.0, abs(scale)) else 0.0
            if not step:
                break
            scale, left = scale + step, after
            if abs(step) < _NEAR_ENOUGH * max(1.0, abs(scale)):
                break
        return scale


def _likely(example: Example, target: Target) -> Iterator[float]:
    """Yield the scales of the laws that loaders have, and a ladder between them."""
    alpha, rank, strength = target.alpha, target.rank, example.strength
    factors = {1.0, 1 / rank, rank**-0.5}
    if alpha is not None:
        factors |= {
            alpha,
            alpha / rank,
            alpha / rank**0.5,
            (alpha / rank) ** 2,
            alpha / rank**2,
            float(int(alpha)) / rank,
        }
    yield from {0.0, *factors, *(strength * factor for factor in factors), *(strength**2 * f for f in factors)}
    yield from (sign * 2.0**power for sign, power in itertools.product((1, -1), range(-4, 5)))
